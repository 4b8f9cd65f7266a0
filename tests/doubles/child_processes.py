"""Child processes for parts of tests: forks of a server process with preloaded modules."""

from multiprocessing import get_context

OWN_PROCESSES = get_context("forkserver")
"""A `multiprocessing` context; its processes can change their mounts and user, and start with preloaded modules."""

OWN_PROCESSES.set_forkserver_preload(["__main__", "pytest", "sandbox.bootstrap.runner", "sandbox.store.sqlite"])
