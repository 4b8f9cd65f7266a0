"""Periodic work: removal of leftovers, pruning, compression, integrity."""
