"""Sandboxes with their own kernel: a QEMU guest, in a jail made by bubblewrap."""

from sandbox.runtimes.qemu.runtime import QemuRuntime

__all__ = ["QemuRuntime"]
