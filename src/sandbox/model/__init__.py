"""The domain model: immutable values and pure functions, without I/O, clocks or event loops."""
