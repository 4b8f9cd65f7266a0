"""Operating system primitives, and limits on CPU time, threads and memory, for several components."""
