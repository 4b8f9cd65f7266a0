"""Sandboxes on the host's kernel, isolated by namespaces and a system call filter."""

from sandbox.runtimes.bubblewrap.runtime import BubblewrapRuntime

__all__ = ["BubblewrapRuntime"]
