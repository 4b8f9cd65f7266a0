"""Measures the growth of the machine's kernel memory."""

import os
from collections.abc import Callable
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_KERNEL_MEMORY_FIELDS = (b"\nSUnreclaim:", b"\nVmallocUsed:")
_MEMINFO_BYTES_MAX = 16384


def read_meminfo(path: Path = _MEMINFO) -> bytes:
    """Return the text of /proc/meminfo. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MEMINFO_BYTES_MAX)
    finally:
        os.close(descriptor)


def count_machine_kernel_bytes(path: Path = _MEMINFO) -> int | None:
    """Return the size of the unreclaimable memory that the kernel has allocated, in bytes; None if unknown."""
    try:
        text = read_meminfo(path)
        return sum(int(text.partition(field)[2].split(maxsplit=1)[0]) << 10 for field in _KERNEL_MEMORY_FIELDS)
    except (OSError, ValueError, IndexError):
        return None


class KernelMemoryGrowth:
    """The growth of the machine's kernel memory, which decides whether a meter inspects the threads of a sandbox.

    limit_bytes: the growth above which threads are inspected.
    """

    def __init__(self, count_kernel_bytes: Callable[[], int | None], limit_bytes: int) -> None:
        self._count_kernel_bytes = count_kernel_bytes
        self._limit_bytes = limit_bytes
        self._lowest_bytes = count_kernel_bytes()
        self._was_above_limit = False

    def measure(self) -> int | None:
        """Return the growth in bytes since the lowest size; 0 if it is within the limit; None if unknown."""
        growth = self._update(self._count_kernel_bytes())
        self._was_above_limit = growth is not None and growth > self._limit_bytes
        return growth if growth is None or self._was_above_limit else 0

    def has_newly_exceeded_limit(self, kernel_bytes: int | None) -> bool:
        """Return whether the growth exceeds the limit now, but did not when it was last measured.

        kernel_bytes: the current size of the kernel's memory; None if unknown.
        """
        growth = self._update(kernel_bytes)
        return growth is not None and growth > self._limit_bytes and not self._was_above_limit

    def _update(self, kernel_bytes: int | None) -> int | None:
        if kernel_bytes is None:
            return None
        self._lowest_bytes = kernel_bytes if self._lowest_bytes is None else min(kernel_bytes, self._lowest_bytes)
        return kernel_bytes - self._lowest_bytes
