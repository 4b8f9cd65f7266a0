"""Sandboxes on gVisor, a kernel that runs as a program of the host."""

from sandbox.runtimes.gvisor.runtime import GvisorRuntime

__all__ = ["GvisorRuntime"]
