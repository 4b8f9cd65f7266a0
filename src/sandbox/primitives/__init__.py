"""Building blocks for several layers: files, concurrency, CPU and client shares, fingerprints, log context."""
