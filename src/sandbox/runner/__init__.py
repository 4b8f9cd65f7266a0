"""The runner: runs one attempt in a separate process that outlives the server."""
