"""Builds, imports and stores images for sandboxes, and resolves profiles to images."""
