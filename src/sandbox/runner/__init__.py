"""Floor 4: one attempt's whole life, in a process of its own that outlives the server."""
