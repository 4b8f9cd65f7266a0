"""Floor 5: who is given what, for the server and for the runner."""
