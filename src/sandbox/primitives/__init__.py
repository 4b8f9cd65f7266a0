"""Operating system primitives that several components use, and limits on CPU time, threads and memory."""
