"""Periodic work: removal of leftovers, pruning, compression, and checks of free space and of the wall clock."""
