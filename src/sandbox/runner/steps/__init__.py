"""The steps of an attempt, one per module: stage, provision, run, collect, teardown."""
