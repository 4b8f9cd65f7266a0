"""Operating-system primitives that several components share."""
