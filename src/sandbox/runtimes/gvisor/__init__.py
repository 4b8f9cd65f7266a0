"""Sandboxes on gVisor, a user-space kernel."""

from sandbox.runtimes.gvisor.runtime import GvisorRuntime

__all__ = ["GvisorRuntime"]
