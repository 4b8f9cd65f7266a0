"""Health, draining, pruning and the hosts of the server."""
