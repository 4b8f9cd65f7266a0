"""Reserves disk space for the last writes of a task or of the server, with a preallocated file."""

import os
from pathlib import Path


class ReserveFile:
    """Implements `interfaces.disks.DiskReserve` with a preallocated file."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    @property
    def is_allocated(self) -> bool:
        """Whether the file exists."""
        return self._path.exists()

    def allocate(self) -> None:
        """Allocate the file completely or not at all. Raises OSError."""
        if self.is_allocated:
            return
        part = self._path.with_suffix(".part")
        try:
            part_fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(part_fd, 0, self._size_bytes)
            finally:
                os.close(part_fd)
            part.rename(self._path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def release(self) -> bool:
        """Remove the file; return whether it was removed."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
