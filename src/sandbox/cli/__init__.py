"""Floor 5: the command line. It reaches the server through the client only."""
