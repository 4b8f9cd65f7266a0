"""Recovery of tasks after a start of the server, and of tasks whose runner died or does not respond."""
