"""Measures the free space of a file system."""

import os
from pathlib import Path

from sandbox.model.disk_space import DiskSpace


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
