"""Processes of their own for a part of a test: forks of one that has imported much, and knows nothing of the tests."""

from multiprocessing import get_context

OWN_PROCESSES = get_context("forkserver")
"""As `multiprocessing` itself; what it starts has its own mounts, user and end, and imports nothing twice."""

OWN_PROCESSES.set_forkserver_preload(["__main__", "pytest", "sandbox.bootstrap.runner", "sandbox.store.sqlite"])
