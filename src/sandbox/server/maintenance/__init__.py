"""Periodic work: garbage collection, pruning, compression, integrity."""
