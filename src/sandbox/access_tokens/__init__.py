"""Access tokens of the server and their roles."""
