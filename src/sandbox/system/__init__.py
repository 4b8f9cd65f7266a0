"""Operating-system primitives, and shares of CPU time, threads and memory, for several components."""
