"""Entry points that build the server and the runner from their components."""
