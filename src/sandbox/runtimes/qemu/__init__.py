"""Sandboxes with a kernel of their own: a guest of QEMU's, which itself is confined by bubblewrap."""

from sandbox.runtimes.qemu.runtime import QemuRuntime

__all__ = ["QemuRuntime"]
