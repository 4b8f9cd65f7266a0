"""Command line interface. It reaches the server only through the client."""
