"""Periodic work: garbage collection, pruning, compaction, integrity."""
