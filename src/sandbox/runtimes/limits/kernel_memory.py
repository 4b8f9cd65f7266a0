"""Measures kernel memory that the limits of control groups do not bound: slabs, their objects, and the machine's total.

The kernel charges objects, not the slabs that contain them. If a program fills many slabs and frees all but one object
of each, most of the charge is removed but little memory is freed. The program can repeat this with other kinds of
objects. The kernel reclaims some kinds, such as cached inodes and file names, but no slab with an inode in use.
The kernel does not show which sandbox caused free objects, mappings, links between anonymous mappings, or cached names.
The last three are charged, but the kernel walks all mappings of a file, removes all links of a process, and walks all
names in a directory, without interruption. Growth is therefore attributed to each sandbox in proportion to its peak
charge and to the CPU time that it has used since the last measurement, relative to the other sandboxes. The whole
growth in mappings is also returned to every sandbox that has as much kernel memory; the caller then counts the
sandbox's own mappings.

The cached extents and the directories on a sandbox's disk can be counted, because the disk is a separate ext4 file
system.
"""

import os
import re
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sandbox.model.fixed_limits import (
    CACHED_EXTENTS_MAX,
    DISK_DIRECTORIES_MAX,
    FREE_SLAB_BYTES_MAX,
    RECLAIMABLE_SLAB_MEMORY_DIVISOR,
)

SLABS = Path("/proc/slabinfo")
_SLAB_DIRECTORY = Path("/sys/kernel/slab")
_HEADER_LINES = 2
VMA_KIND, _ANON_VMA_CHAIN = "vm_area_struct", "anon_vma_chain"
_DENTRY_STATE = Path("/proc/sys/fs/dentry-state")
_DENTRIES_FIELD, _NEGATIVE_DENTRIES_FIELD = 0, 4
DENTRY_BYTES = 192
"""Size of a cached name (struct dentry)."""

VMA_BYTES = 192
"""Size of a mapping (struct vm_area_struct)."""

SLAB_INTERVAL_SECONDS = 1.0
"""Interval at which the machine's slab statistics are read. Each read takes a few milliseconds."""

_PEAK_CHARGE_FACTOR = 16
"""Limit on the attributed bytes, as a multiple of the sandbox's peak charge.

A sandbox that was never charged for 1/16 of its limit has not exceeded the limit: others caused the growth.
"""

_CPU_SECONDS_MIN = 0.001
"""Amount added to each sandbox's CPU time between two measurements, because an unknown CPU time counts as 0."""


class GroupUsage(NamedTuple):
    """The usage charged to a sandbox's control group: kernel memory now, and CPU time since the group was created.

    reclaimable_bytes: the part of the kernel memory that the kernel can reclaim, such as cached inodes and file names.
        0 if unknown, as with cgroup v1.
    """

    kernel_bytes: int
    cpu_seconds: float = 0.0
    reclaimable_bytes: int = 0


class SlabUsage(NamedTuple):
    """Kernel memory in slabs.

    unreclaimable_free_bytes, reclaimable_free_bytes: free objects of the kinds that the kernel cannot reclaim, and of
        those that it can, such as cached inodes.
    anon_vma_chain_bytes: the links between anonymous mappings, which are in use. A mapping has one link for each
        ancestor with which its process may share pages of the mapping.
    dentry_bytes: the cached names of files (dentries), including names of nonexistent files.
    vma_bytes: the mappings of all processes, which are in use.
    vma_bytes_upper_bound: equal to vma_bytes, but a `SlabMeter` does not divide its growth between the sandboxes.
    """

    unreclaimable_free_bytes: int
    reclaimable_free_bytes: int
    anon_vma_chain_bytes: int = 0
    dentry_bytes: int = 0
    vma_bytes: int = 0
    vma_bytes_upper_bound: int = 0


class SlabObjects(NamedTuple):
    """The kernel objects of one kind: those in use, the total including free ones, and the size of one object."""

    used: int
    total: int
    object_bytes: int


class SlabStatistics:
    """The machine's slabs, read at most once a second. The meters of a sandbox share one instance."""

    def __init__(self, slabs: Path = SLABS, clock: Callable[[], float] = time.monotonic) -> None:
        self._slabs = slabs
        self._clock = clock
        self._kinds: Mapping[str, SlabObjects] | None = None
        self._next_at: float | None = None

    def read(self) -> Mapping[str, SlabObjects] | None:
        """Return the objects, keyed by the name of their kind; None if only root may read the statistics."""
        if self._next_at is None or self._clock() >= self._next_at:
            self._next_at = self._clock() + SLAB_INTERVAL_SECONDS
            self._kinds = self._parse()
        return self._kinds

    def measure_usage(
        self, slab_directory: Path = _SLAB_DIRECTORY, dentry_state: Path = _DENTRY_STATE
    ) -> SlabUsage | None:
        """Return the kernel memory in slabs; None if only root may read the statistics."""
        kinds = self.read()
        if kinds is None:
            return None
        free_bytes = {name: (one.total - one.used) * one.object_bytes for name, one in kinds.items()}
        reclaimable_bytes = sum(free for name, free in free_bytes.items() if is_reclaimable(name, slab_directory))
        unreclaimable_bytes = sum(free_bytes.values()) - reclaimable_bytes
        vma_bytes, anon_vma_chain_bytes = (
            kinds[name].used * kinds[name].object_bytes if name in kinds else 0 for name in (VMA_KIND, _ANON_VMA_CHAIN)
        )
        dentry_bytes = _count_dentries(dentry_state, _DENTRIES_FIELD) * DENTRY_BYTES
        return SlabUsage(
            unreclaimable_bytes, reclaimable_bytes, anon_vma_chain_bytes, dentry_bytes, vma_bytes, vma_bytes
        )

    def _parse(self) -> Mapping[str, SlabObjects] | None:
        try:
            lines = self._slabs.read_text().splitlines()[_HEADER_LINES:]
        except OSError:
            return None
        fields = (line.split(maxsplit=4) for line in lines)
        return {name: SlabObjects(int(used), int(total), int(size)) for name, used, total, size, _ in fields}


def count_used_objects(kind: str, slabs: Path = SLABS) -> int | None:
    """Read how many objects of a kind the whole machine uses now; None if unknown, for example to ordinary users."""
    with suppress(OSError):
        found = re.search(rf"^{re.escape(kind)} +(\d+) ", slabs.read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def count_negative_dentries(dentry_state: Path = _DENTRY_STATE) -> int:
    """Return how many names of nonexistent files the kernel has cached; 0 if unknown, as before Linux 5.0."""
    return _count_dentries(dentry_state, _NEGATIVE_DENTRIES_FIELD)


def _count_dentries(dentry_state: Path, field: int) -> int:
    try:
        return int(dentry_state.read_text().split()[field])
    except (OSError, ValueError, IndexError):
        return 0


def reclaimable_free_slab_bytes_max() -> int:
    """Return the limit for free objects of reclaimable kinds, in bytes.

    The limit is a share of the machine's memory, because free objects remain in all slabs when the kernel reclaims
    memory.
    """
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(FREE_SLAB_BYTES_MAX, machine_bytes // RECLAIMABLE_SLAB_MEMORY_DIVISOR)


@cache
def is_reclaimable(name: str, slab_directory: Path) -> bool:
    """Return whether the kernel can reclaim objects of this kind, such as cached file names."""
    try:
        return (slab_directory / name / "reclaim_account").read_text().strip() == "1"
    except OSError:
        return False


def load_slab_kinds() -> None:
    """Read which kinds of objects the kernel can reclaim. Processes that are forked later need not read this again."""
    SlabStatistics().measure_usage()


class _Growth:
    """One sandbox's share of the growth in one kind of slab memory since the first measurement."""

    def __init__(self, first: int) -> None:
        self._first = self._last = first
        self._bytes = 0.0

    def update(self, current: int, share: float) -> None:
        self._bytes += max(0, current - self._last) * share
        self._bytes = min(self._bytes, max(0, current - self._first))
        self._last = current

    def attributed(self, peak_charge_bytes: int) -> int:
        return round(min(self._bytes, _PEAK_CHARGE_FACTOR * peak_charge_bytes))


class SlabMeter:
    """Measures the slab memory that is attributed to one sandbox since the first measurement."""

    def __init__(
        self,
        measure_all: Callable[[], SlabUsage | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._measure_all = measure_all
        self._clock = clock
        self._growths: tuple[_Growth, ...] | None = None
        self._updated_at = 0.0
        self._peak_charge_bytes = 0
        self._cpu_seconds = 0.0
        self._cpu_seconds_of_others: Mapping[str, float] = {}

    def is_due(self) -> bool:
        """Return whether a second has passed since the machine's slabs were read."""
        return self._clock() - self._updated_at >= SLAB_INTERVAL_SECONDS

    def measure(
        self, usage: GroupUsage | None, usage_of_others: Callable[[], Mapping[str, GroupUsage]]
    ) -> SlabUsage | None:
        """Return the attributed bytes, or None if they cannot be measured.

        usage: the sandbox's usage; None if unknown. usage_of_others: returns the usage of the other sandboxes, keyed by
        the names of their groups.
        """
        if usage is None:
            return None
        self._peak_charge_bytes = max(self._peak_charge_bytes, usage.kernel_bytes)
        if self._growths is None or self.is_due():
            self._update(usage, usage_of_others())
        if self._growths is None:
            return None
        found = SlabUsage(*(growth.attributed(self._peak_charge_bytes) for growth in self._growths))
        unreclaimable_bytes = max(0, usage.kernel_bytes - usage.reclaimable_bytes)
        return found._replace(
            anon_vma_chain_bytes=min(found.anon_vma_chain_bytes, unreclaimable_bytes),
            dentry_bytes=min(found.dentry_bytes, usage.kernel_bytes),
            vma_bytes=min(found.vma_bytes, unreclaimable_bytes),
            vma_bytes_upper_bound=min(found.vma_bytes_upper_bound, unreclaimable_bytes),
        )

    def _update(self, usage: GroupUsage, others: Mapping[str, GroupUsage]) -> None:
        share = self._share(usage, others)
        slabs = self._measure_all()
        self._updated_at = self._clock()
        if slabs is None:
            return
        if self._growths is None:
            self._growths = tuple(_Growth(first) for first in slabs)
        for kind, growth, current in zip(SlabUsage._fields, self._growths, slabs, strict=True):
            growth.update(current, 1.0 if kind == "vma_bytes_upper_bound" else share)

    def _share(self, usage: GroupUsage, others: Mapping[str, GroupUsage]) -> float:
        """Return the sandbox's share of the growth since the last call."""
        own_weight = self._peak_charge_bytes * (usage.cpu_seconds - self._cpu_seconds + _CPU_SECONDS_MIN)
        weight_of_others = sum(
            other.kernel_bytes * (other.cpu_seconds - self._cpu_seconds_of_others.get(name, 0.0) + _CPU_SECONDS_MIN)
            for name, other in others.items()
        )
        self._cpu_seconds = usage.cpu_seconds
        self._cpu_seconds_of_others = {name: other.cpu_seconds for name, other in others.items()}
        weight = own_weight + weight_of_others
        return own_weight / weight if weight else 1.0


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


def count_machine_unreclaimable_bytes(path: Path = _MEMINFO) -> int | None:
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
        """Return the number of extents; 0 while the machine has few.

        Returns None if the disk is not a separate ext4, or if the number is unknown.
        """
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
        """Return the number of directories; 0 while the disk has few files.

        Returns None if the disk is not a separate ext4, or if the number is unknown.
        """
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
