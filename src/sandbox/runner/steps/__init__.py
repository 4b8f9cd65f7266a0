"""The steps of an attempt, one per module: prepare the workspace, provision, run, collect, teardown."""
