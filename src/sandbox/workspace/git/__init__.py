"""Running git on the host."""
