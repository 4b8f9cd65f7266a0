"""The worker: runs the attempts of one task on a host of a cluster, and reports to the server."""
