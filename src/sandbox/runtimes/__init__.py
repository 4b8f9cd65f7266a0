"""Floor 3: what makes sandboxes."""
