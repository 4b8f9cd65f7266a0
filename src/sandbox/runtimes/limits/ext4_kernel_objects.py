"""Counts the cached extents and the directories on a sandbox's disk, which is a separate ext4 file system.

The limits of control groups do not bound these kernel objects.
"""

import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

from sandbox.model.fixed_limits import CACHED_EXTENTS_MAX, DISK_DIRECTORIES_MAX
from sandbox.runtimes.limits.slab_usage import SLAB_INTERVAL_SECONDS, SlabStatistics

_EXTENT_KIND = "extent_status"
_EXTENTS_OF_FILE_SYSTEM = re.compile(r"^ *(\d+) objects$", re.MULTILINE)
_CAPACITY_FILE = Path("/sys/kernel/slab/extent_status/total_objects")
"""Contains the number of extents for which the kernel has memory, including free ones. Faster to read than slabinfo."""

_BLOCK_DEVICES = Path("/sys/dev/block")
_EXT4_STATISTICS = Path("/proc/fs/ext4")


class CachedExtentMeter:
    """Counts the cached extents of the files on a sandbox's disk. No control group is charged for these extents.

    Reads the statistics of the disk's file system only while the machine has many extents: for each read, the kernel
    walks all cached inodes of the file system while holding a lock.
    """

    def __init__(
        self,
        disk: Path,
        slabs: SlabStatistics,
        devices: Path = _BLOCK_DEVICES,
        statistics: Path = _EXT4_STATISTICS,
        clock: Callable[[], float] = time.monotonic,
        capacity_file: Path = _CAPACITY_FILE,
    ) -> None:
        self._disk = disk
        self._slabs = slabs
        self._capacity_file = capacity_file
        self._devices = devices
        self._statistics = statistics
        self._clock = clock
        self._count: int | None = None
        self._counted_at: float | None = None

    def is_due(self) -> bool:
        """Return whether the next call of `count` counts the extents again."""
        return self._counted_at is None or self._clock() - self._counted_at >= SLAB_INTERVAL_SECONDS

    def count(self) -> int | None:
        """Return the number of extents; 0 while the machine has few; None if the disk is not a separate ext4."""
        if self.is_due():
            self._counted_at = self._clock()
            self._count = self._read()
        return self._count

    def _read(self) -> int | None:
        try:
            if not os.path.ismount(self._disk):
                return None
            if self._has_few_extents():
                return 0
            kinds = self._slabs.read()
            if kinds is None:
                return None
            if _EXTENT_KIND in kinds and kinds[_EXTENT_KIND].used <= CACHED_EXTENTS_MAX:
                return 0
            name = _find_device(self._disk, self._devices)
            found = _EXTENTS_OF_FILE_SYSTEM.search((self._statistics / name / "es_shrinker_info").read_text())
        except OSError:
            return None
        return int(found[1]) if found else None

    def _has_few_extents(self) -> bool:
        try:
            return int(self._capacity_file.read_text().split()[0]) <= CACHED_EXTENTS_MAX
        except (OSError, ValueError, IndexError):
            return False


def _find_device(disk: Path, devices: Path) -> str:
    """Return the name of the block device of a mounted disk. Raises OSError."""
    device = disk.stat().st_dev
    return (devices / f"{os.major(device)}:{os.minor(device)}").resolve().name


_SUPERBLOCK_BYTES = 1024
_SUPERBLOCK = struct.Struct("<4xI12xII4xI20xH38xI154xH80xI684x")
"""Fields of ext4's superblock: number of blocks, first data block, block size, blocks per group, magic, incompatible
features, descriptor size, high bits of the number of blocks."""

_MAGIC = 0xEF53
_META_BLOCK_GROUPS, _LARGE_DESCRIPTORS = 0x10, 0x80
_GROUP_BYTES, _GROUP = 32, struct.Struct("<16xH14x")
_LARGE_GROUP = struct.Struct("<16xH30xH14x")
"""Formats that extract the number of directories from a block group descriptor.

A large descriptor stores the low and the high bits of the number separately.
"""


class DirectoryMeter:
    """Counts the directories on a sandbox's disk.

    The number for each block group is in the file system's group descriptors, which the kernel caches with the block
    device. They are read only while the disk has so many files that there may be too many directories.
    """

    def __init__(
        self,
        disk: Path,
        devices: Path = _BLOCK_DEVICES,
        device_files: Path = Path("/dev"),
        files_min: int = DISK_DIRECTORIES_MAX,
    ) -> None:
        self._disk = disk
        self._devices = devices
        self._device_files = device_files
        self._files_min = files_min

    def count(self) -> int | None:
        """Return the number of directories; 0 while the disk has few files; None if the disk is not a separate ext4."""
        try:
            if not os.path.ismount(self._disk):
                return None
            found = os.statvfs(self._disk)
            if found.f_files - found.f_ffree <= self._files_min:
                return 0
            return _sum_directories(self._device_files / _find_device(self._disk, self._devices))
        except OSError:
            return None


def _sum_directories(device: Path) -> int | None:
    with device.open("rb") as file:
        superblock = file.read(2 * _SUPERBLOCK_BYTES)[_SUPERBLOCK_BYTES:]
        if len(superblock) < _SUPERBLOCK_BYTES:
            return None
        blocks, first, size, per_group, magic, features, descriptor_bytes, high = _SUPERBLOCK.unpack(superblock)
        if magic != _MAGIC or features & _META_BLOCK_GROUPS or not per_group:
            return None
        if not features & _LARGE_DESCRIPTORS:
            descriptor_bytes, high = _GROUP_BYTES, 0
        groups = -(-((high << 32 | blocks) - first) // per_group)
        file.seek((first + 1) * (_SUPERBLOCK_BYTES << size))
        table = file.read(groups * descriptor_bytes)
    layout = _GROUP if descriptor_bytes == _GROUP_BYTES else _LARGE_GROUP
    if len(table) < groups * descriptor_bytes or descriptor_bytes != layout.size:
        return None
    return int(sum(low + (highs[0] << 16 if highs else 0) for low, *highs in layout.iter_unpack(table)))
