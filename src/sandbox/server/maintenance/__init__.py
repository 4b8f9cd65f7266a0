"""Periodic work: removal of leftovers, pruning, compression and integrity checks."""
