"""The disk of an attempt: its workspace, home and /tmp, with one size limit for all three."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.model.resources import DiskSpace

RemovePaths = Callable[[Sequence[Path]], Awaitable[None]]
"""Removes files that sandboxes left behind, whatever their modes. The caller sets a time limit. Raises OSError."""


class DiskUsage(msgspec.Struct, frozen=True):
    """Usage of one disk. is_full: no space is left, or no more files can be created."""

    used_bytes: int
    total_bytes: int
    is_full: bool


class Disk(Protocol):
    """Provides one attempt's `AttemptLayout.disk`, a directory with a size limit, for the lifetime of this process."""

    @property
    def enforces_size(self) -> bool:
        """Whether writes beyond the size limit fail inside the sandbox (ENOSPC).

        If not, callers must poll `measure_and_trim`.
        """
        ...

    async def open(self, size_bytes: int) -> None:
        """Create the disk, or open the disk of an earlier process of the attempt; that process must have ended.

        Raises AttemptError (provision_failed).
        """
        ...

    async def measure_and_trim(self) -> DiskUsage:
        """Return the usage of the open disk. A disk image also returns unused space to the host. Raises OSError."""
        ...

    async def sync(self) -> None:
        """Flush the open disk. Raise OSError if data written to it was lost because the host could not store it.

        A loss is permanent: every later call raises too, even after the disk was closed.
        """
        ...

    async def close(self) -> None:
        """Close the disk and keep its content. Idempotent. Raises AttemptError (sandbox_lost)."""
        ...


MeasureDiskSpace = Callable[[], DiskSpace]
"""Measures the free space. Raises OSError."""


class DiskReserve(Protocol):
    """Disk space reserved for writes that must not be lost when the disk is full."""

    @property
    def is_allocated(self) -> bool:
        """Return whether the reserve exists and can be released. Raises OSError."""
        ...

    def allocate(self) -> None:
        """Allocate the reserve. Idempotent. Raises OSError."""
        ...

    def release(self) -> bool:
        """Release the reserve. Return whether there was one. Never raises."""
        ...
