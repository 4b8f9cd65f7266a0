"""Building blocks for several layers: files, concurrency, fairness, message streams, fingerprints, log context."""
