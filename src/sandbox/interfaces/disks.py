"""The disk of an attempt: workspace, home and /tmp together, with a size."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.interfaces.layout import AttemptLayout
from sandbox.model.disk_space import DiskSpace

RemovePaths = Callable[[Sequence[Path]], Awaitable[None]]
"""Removes what sandboxes left, whatever their agents made of it; the caller bounds it. Raises OSError."""


class DiskUsage(msgspec.Struct, frozen=True):
    """Of one disk, in bytes. is_full: there is no room, or no more files can be made."""

    used_bytes: int
    total_bytes: int
    is_full: bool


class Disks(Protocol):
    """Makes `AttemptLayout.disk` a directory that holds no more than it may, as long as this process lives."""

    @property
    def enforces_size(self) -> bool:
        """Whether a write past the bound fails inside (ENOSPC). Where not, somebody must look at `use`."""
        ...

    async def open(self, files: AttemptLayout, size_bytes: int) -> None:
        """Make the disk, or find the one that an earlier process of the attempt made: it must be dead by now.

        Raises AttemptError (provision_failed).
        """
        ...

    async def usage(self, files: AttemptLayout) -> DiskUsage:
        """How full an open disk is. Raises OSError."""
        ...

    async def verify(self, files: AttemptLayout) -> None:
        """Raises OSError where something that was written to an open disk is lost: the host could not store it.

        What is lost stays lost: it is said each time, also after the disk was closed.
        """
        ...

    async def close(self, files: AttemptLayout) -> None:
        """Let go of it; what is in it is kept. Again is fine. Raises AttemptError (sandbox_lost)."""
        ...


MeasureDiskSpace = Callable[[], DiskSpace]
"""What is free at the moment. Raises OSError."""


class DiskReserve(Protocol):
    """Room that is kept for writing what must not be lost when there is none any more."""

    @property
    def is_allocated(self) -> bool:
        """Whether it is there to be given back. Raises OSError."""
        ...

    def allocate(self) -> None:
        """Keep it; again is fine. Raises OSError."""
        ...

    def release(self) -> bool:
        """Make room of it. Whether there was any to give. Raises nothing."""
        ...
