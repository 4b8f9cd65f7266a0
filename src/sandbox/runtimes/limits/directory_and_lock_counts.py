"""Counts a sandbox's open directories and file locks, by reading the host's /proc.

Locks, partly read directories and similar objects are not charged to any control group. Only descriptors show which
sandbox an object belongs to: /proc/locks names the process that took a lock, but that process may have ended and its id
may have been reused.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from sandbox.model.fixed_limits import FILE_LOCKS_MAX, OPEN_DIRECTORIES_MAX, OPEN_FILES_OF_SANDBOX_MAX
from sandbox.runtimes.limits.descriptor_tables import (
    count_open_files,
    descriptor_table_size,
    find_counted_fd_table,
    find_fd_table,
    is_directory,
    is_o_path_descriptor,
    is_shared_with_host,
    list_directory,
    list_locks,
)
from sandbox.runtimes.limits.kernel_usage import FileUsage
from sandbox.runtimes.limits.slab_usage import SLAB_INTERVAL_SECONDS, SlabStatistics

_PROC_LOCKS = Path("/proc/locks")
_FILE_LOCKS_OF_MACHINE_MIN = 1024
"""While the machine has fewer locks, a sandbox's locks are not counted, because counting takes a long time."""

_LOCK_KIND = "file_lock_cache"
"""The kernel's name for file locks in slab statistics. A kernel that merges kinds of the same size does not show it."""

_LOCK_PAUSE_FACTOR = 10
"""Time between two counts of the machine's locks, as a multiple of the time that a count takes."""

_LISTED_LOCKS_MAX = 65_536
"""Maximum number of the machine's locks that are inspected, because the kernel walks the list for each 4 KiB of it."""

_PID_FIELD, _FILE_FIELD = 4, 5
"""Fields of a line in /proc/locks: number, kind, mode, access, process id, `MAJOR:MINOR:INODE` of the file, range."""

_SAMPLE_SIZE_MAX = 4096
"""Maximum number of open files to inspect; a larger set is randomly sampled each time."""

_LISTED_FILES_MAX = 65_536
"""Maximum size of a descriptor table that is listed.

Listing a million descriptors takes 1 to 2 s of CPU time, and the kernel keeps an inode of /proc for each of them.
"""
_TRIED_DESCRIPTORS_MAX = 4 * _SAMPLE_SIZE_MAX
"""Maximum number of random descriptors that are inspected in a larger table, whether they are open or not."""

_LOCK_COUNT_SECONDS = 2.0
"""Maximum CPU time of one count of locks. A count usually takes 0.2 s.

For an epoll or inotify instance, the kernel also lists all files that the instance watches, which takes 0.5 s for a
million entries.
"""


def count_files(process_ids: Collection[int], *, counts_locks: bool = True) -> FileUsage:
    """Count the open files of one sandbox's processes.

    counts_locks: pass False to avoid waiting for a program inside. To list the locks of an epoll or inotify instance,
        the kernel needs the instance's lock, which a program can hold for a long time.

    With many files, the number of directories is an estimate. The number of locks is a lower bound and never
    extrapolated, because one file can have all of them.
    """
    tables = dict(filter(None, map(find_counted_fd_table, process_ids)))
    total = sum(tables.values())
    are_locks_counted, are_directories_counted = counts_locks and has_many_locks(), total > OPEN_DIRECTORIES_MAX
    if total > OPEN_FILES_OF_SANDBOX_MAX or not (are_locks_counted or are_directories_counted):
        return FileUsage(total)
    files = [f"{table}/{{}}/{name}" for table in tables for name in list_directory(f"{table}/fd")]
    sample = random.sample(files, min(len(files), _SAMPLE_SIZE_MAX))
    directories = sum(map(is_directory, sample)) if are_directories_counted else 0
    locks = sum_locks(sample) if are_locks_counted else FileLockCounts()
    scale = len(files) / max(1, len(sample))
    return FileUsage(
        total,
        directories=round(directories * scale),
        locks=locks.posix,
        locks_on_host_files=round(locks.on_host_files * scale),
        was_cut_short=locks.was_cut_short,
    )


class FileLockCounts(msgspec.Struct):
    """Counts of the locks taken through a set of open files.

    posix: number of POSIX locks.
    on_host_files: number of locks of any kind on files that the host also uses.
    was_cut_short: whether counting stopped early because it took too long.
    """

    posix: int = 0
    on_host_files: int = 0
    was_cut_short: bool = False


def sum_locks(files: Collection[str]) -> FileLockCounts:
    """Return the locks that were taken through these open files."""
    deadline, found = time.thread_time() + _LOCK_COUNT_SECONDS, FileLockCounts()
    for file in files:
        if time.thread_time() > deadline:
            found.was_cut_short = True
            break
        kinds = list_locks(file)
        found.posix += kinds.count("POSIX")
        if kinds and is_shared_with_host(file):
            found.on_host_files += len(kinds)
    return found


def count_directories(process_ids: Collection[int], *, descriptors_per_directory: int) -> FileUsage:
    """Count the open directories of a sandbox whose kernel is a host program, which opens all of them in one process.

    Other processes may share that process's descriptor table, so the numbers are not added up. Descriptors opened with
    O_PATH do not count. descriptors_per_directory: number of descriptors that the program opens for a directory.
    """
    tables = {table: count_open_files(table) for pid in process_ids if (table := find_fd_table(pid))}
    table = max(tables, key=lambda one: tables[one], default="")
    count = tables.get(table, 0)
    if count <= OPEN_DIRECTORIES_MAX:
        return FileUsage()
    if count <= _LISTED_FILES_MAX:
        descriptors: Sequence[str | int] = list_directory(f"{table}/fd")
        sample_size = min(len(descriptors), _SAMPLE_SIZE_MAX)
    else:
        descriptors = range(descriptor_table_size(table))
        sample_size = min(len(descriptors), _TRIED_DESCRIPTORS_MAX)
    sample = [f"{table}/{{}}/{descriptor}" for descriptor in random.sample(descriptors, sample_size)]
    found = sum(is_directory(file) and not is_o_path_descriptor(file) for file in sample)
    return FileUsage(directories=round(found * len(descriptors) / max(1, sample_size) / descriptors_per_directory))


class FileLockMeter:
    """Counts the file locks of a sandbox while the machine has many, also those without an open descriptor."""

    def __init__(self, slabs: SlabStatistics, clock: Callable[[], float] = time.monotonic) -> None:
        self._slabs = slabs
        self._clock = clock
        self._count: int | None = None
        self._next_at: float | None = None

    def count(self, count_own: Callable[[int], int]) -> int | None:
        """Return the number of locks; 0 while the machine has few; None if the kernel does not show their number.

        count_own: returns the sandbox's locks, given the number of the machine's locks. It is called at most once in
        SLAB_INTERVAL_SECONDS, and takes at most a tenth of the time.
        """
        now = self._clock()
        if self._next_at is None or now >= self._next_at:
            self._count = self._read(count_own)
            self._next_at = now + max(SLAB_INTERVAL_SECONDS, _LOCK_PAUSE_FACTOR * (self._clock() - now))
        return self._count

    def _read(self, count_own: Callable[[int], int]) -> int | None:
        kinds = self._slabs.read()
        if kinds is None or _LOCK_KIND not in kinds:
            return None
        machine_locks = kinds[_LOCK_KIND].used
        return count_own(machine_locks) if machine_locks > FILE_LOCKS_MAX else 0


def count_locks_by_owner(
    process_ids: Collection[int], locks: Path = _PROC_LOCKS, proc: Path = Path("/proc")
) -> tuple[int, int]:
    """Count the file locks of a sandbox, and those that other running processes took, including waiting locks.

    process_ids: the sandbox's processes. Locks on files of file systems that only the sandbox has mounted are the
    sandbox's, even if the process that took them has ended. At most _LISTED_LOCKS_MAX locks are inspected. Takes 0.3 s
    for 60,000 locks.
    """
    try:
        with locks.open() as file:
            lines = (line.replace("->", " ").split() for line in islice(file, _LISTED_LOCKS_MAX))
            counts = Counter(
                (fields[_PID_FIELD], fields[_FILE_FIELD].rpartition(":")[0])
                for fields in lines
                if len(fields) > _FILE_FIELD
            )
    except OSError:
        return 0, 0
    names, own_devices = {str(pid) for pid in process_ids}, set[str]()
    if process_ids and (host_devices := _mounted_devices(proc / "1")):
        # All processes of a sandbox except the outer bwrap are in one mount namespace.
        first, last = min(process_ids), max(process_ids)
        own_devices = (_mounted_devices(proc / str(first)) | _mounted_devices(proc / str(last))) - host_devices
    own = others = 0
    for (name, device), count in counts.items():
        if name in names or device in own_devices:
            own += count
        elif (proc / name).exists():
            others += count
    return own, others


def _mounted_devices(process: Path) -> set[str]:
    """Return the devices of the file systems that a process has mounted, as written in /proc/locks."""
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return set()
    numbers = (line.split(maxsplit=3)[2].split(":") for line in lines)
    return {f"{int(major):02x}:{int(minor):02x}" for major, minor in numbers}


def has_many_locks() -> bool:
    """Return whether the machine has so many file locks that a sandbox may exceed its limit."""
    try:
        with _PROC_LOCKS.open() as file:
            return sum(1 for _ in islice(file, _FILE_LOCKS_OF_MACHINE_MIN)) == _FILE_LOCKS_OF_MACHINE_MIN
    except OSError:
        return False
