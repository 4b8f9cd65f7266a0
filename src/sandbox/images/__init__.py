"""Images for sandboxes: builds, imports and stores them, and resolves profiles to images."""
