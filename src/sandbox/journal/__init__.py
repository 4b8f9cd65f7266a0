"""The journal of a task: an append-only file."""
