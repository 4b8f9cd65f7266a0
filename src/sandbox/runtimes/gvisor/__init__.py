"""Sandboxes on gVisor, a kernel of their own that is a program of the host."""

from sandbox.runtimes.gvisor.runtime import GvisorRuntime

__all__ = ["GvisorRuntime"]
