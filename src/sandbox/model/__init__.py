"""The domain model: immutable values and pure functions, without I/O, clock and event loop."""
