"""Sandboxes of namespaces and a system call filter, on the host's kernel."""

from sandbox.runtimes.bubblewrap.runtime import BubblewrapRuntime

__all__ = ["BubblewrapRuntime"]
