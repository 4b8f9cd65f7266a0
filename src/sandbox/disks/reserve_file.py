"""Measures free space, and reserves a part of it for the last writes of a task or of the server."""

import os
from pathlib import Path

from sandbox.model.resources import DiskSpace


def measure_disk_space(directory: Path) -> DiskSpace:
    """Return what statvfs(3) reports. Raises OSError."""
    found = os.statvfs(directory)
    return DiskSpace(
        free_bytes=found.f_bavail * found.f_frsize,
        total_bytes=found.f_blocks * found.f_frsize,
        files_free=found.f_favail,
        files_total=found.f_files,
        is_read_only=bool(found.f_flag & os.ST_RDONLY),
    )


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
