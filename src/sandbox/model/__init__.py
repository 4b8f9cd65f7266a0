"""The domain model: pure values and functions. No I/O, no clock, no event loop."""
