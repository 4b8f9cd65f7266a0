"""Runs parts of tests in child processes, which are forked from a server process with preloaded modules."""

from multiprocessing import get_context

MULTIPROCESSING_FORKSERVER = get_context("forkserver")
"""A `multiprocessing` context; its processes can change their mounts and user, and start with preloaded modules."""

MULTIPROCESSING_FORKSERVER.set_forkserver_preload(
    ["__main__", "pytest", "sandbox.bootstrap.runner", "sandbox.store.sqlite"]
)
