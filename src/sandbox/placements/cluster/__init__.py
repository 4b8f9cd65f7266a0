"""Runs attempts on the hosts of a cluster: an engine starts one worker for each task."""
