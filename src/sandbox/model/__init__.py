"""Floor 1: what a task is, in pure values and functions. No I/O, no clock, no event loop."""
