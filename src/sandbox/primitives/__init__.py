"""Building blocks of several layers: files, concurrency, shares of CPU and of clients, fingerprints, log context."""
