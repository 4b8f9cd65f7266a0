"""Counts what a sandbox's open descriptors refer to, from the host's /proc: files, directories, locks, epoll entries.

Locks, partly read directories and similar objects are not charged to any control group. Only descriptors show which
sandbox an object belongs to: /proc/locks names the process that took a lock, but that process may have ended and its id
may have been reused.

An event on a file wakes all of the file's epoll entries at once, with interrupts disabled, which takes about 0.12 µs
for each entry. If a timer causes the event, this happens in an interrupt, which is not charged to any control group.
There can be more entries than descriptors, because each pair of an epoll instance and a descriptor is an entry. The
kernel's limit (`fs.epoll.max_user_watches`) is in the millions.
"""

import ctypes
import os
import random
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.fixed_limits import (
    EPOLL_ENTRIES_MAX,
    FILE_LOCKS_MAX,
    OPEN_DIRECTORIES_MAX,
    OPEN_FILES_OF_SANDBOX_MAX,
)
from sandbox.runtimes.limits.kernel_memory import SLAB_INTERVAL_SECONDS, SLABS, SlabStatistics, count_used_objects
from sandbox.runtimes.limits.measurement_scheduling import OtherSandboxMeasurement
from sandbox.runtimes.limits.usage_limits import FileUsage

_FDINFO_BYTES_MAX = 1 << 20
"""Maximum number of bytes to read about one open file. Its locks come first, and more than FILE_LOCKS_MAX fit."""

_TABLE_SIZE = re.compile(r"^FDSize:\s*(\d+)$", re.MULTILINE)
_FLAGS = re.compile(r"^flags:\s*(\d+)$", re.MULTILINE)
_LOCK_LINE = re.compile(r"^lock:\s+\d+: (\w+)", re.MULTILINE)

_SANDBOX_PATH_PREFIXES = (
    *(SANDBOX_WORKSPACE, SANDBOX_HOME, "/tmp", "/dev/shm", "/dev/pts", "/proc"),  # noqa: S108
    *("/memfd:", "/SYSV", "pipe:", "socket:"),
)
"""Path prefixes of files that have a separate inode in each sandbox."""

_SYSCTL_DIRECTORY = "/proc/sys/"
"""Prefix of the settings that are bind-mounted from the host's /proc if the server runs as an ordinary user."""


def find_fd_table(pid: int) -> str | None:
    """Return the /proc directory with a process's open files. Its first thread may have ended before the others."""
    found = find_counted_fd_table(pid)
    return None if found is None else found[0]


def find_counted_fd_table(pid: int) -> tuple[str, int] | None:
    """Return the /proc directory with a process's open files, and their number; None if none is visible."""
    process_directory = f"/proc/{pid}"
    if count := count_open_files(process_directory):
        return process_directory, count
    threads = (f"{process_directory}/task/{thread}" for thread in list_directory(f"{process_directory}/task"))
    return next(((thread, count) for thread in threads if (count := count_open_files(thread))), None)


def count_open_files(table: str) -> int:
    """Return the number of open files; 0 if they are not visible. Before Linux 6.2, the size of the directory is 0."""
    with suppress(OSError):
        return os.stat(f"{table}/fd").st_size or len(list_directory(f"{table}/fd"))  # noqa: PTH116  (Path is slow)
    return 0


def descriptor_table_size(table: str) -> int:
    """Return the number of entries in a descriptor table, including unused ones; 0 if the table is gone."""
    with suppress(OSError):
        # The name of a program may contain any bytes.
        found = _TABLE_SIZE.search(Path(f"{table}/status").read_text(errors="replace"))
        return int(found[1]) if found is not None else 0
    return 0


def list_directory(directory: str) -> list[str]:
    """Return the names in a directory under /proc; empty if the directory is gone or hidden."""
    with suppress(OSError), os.scandir(directory) as entries:
        return [entry.name for entry in entries]
    return []


def is_directory(file: str) -> bool:
    """Return whether the file is a directory. file: path with braces in place of `fd` or `fdinfo`."""
    with suppress(OSError):
        return stat.S_ISDIR(Path(file.format("fd")).stat().st_mode)
    return False


def is_o_path_descriptor(file: str) -> bool:
    """Return whether the file was opened with O_PATH; True if the file is gone."""
    with suppress(OSError):
        flags = _FLAGS.search(Path(file.format("fdinfo")).read_text())
        return flags is not None and bool(int(flags[1], 8) & os.O_PATH)
    return True


def list_locks(file: str) -> list[str]:
    """Return the kind of each lock taken through this open file; empty if the file was closed.

    There can be many POSIX locks, but at most one lock of each other kind.
    """
    with suppress(OSError), Path(file.format("fdinfo")).open() as info:
        return _LOCK_LINE.findall(info.read(_FDINFO_BYTES_MAX))
    return []


def is_shared_with_host(file: str) -> bool:
    """Return whether the host uses this file too: a device, a file of /usr or of an image, an eventfd or similar."""
    with suppress(OSError):
        path = str(Path(file.format("fd")).readlink())
        return path.startswith(_SYSCTL_DIRECTORY) or not path.startswith(_SANDBOX_PATH_PREFIXES)
    return False


_PROC_LOCKS = Path("/proc/locks")
_FILE_LOCKS_OF_MACHINE_MIN = 1024
"""While the machine has fewer locks, a sandbox's locks are not counted, because counting takes a long time."""

_LOCK_CAPACITY_FILE = Path("/sys/kernel/slab/file_lock_cache/total_objects")
"""The number of file locks, including free ones, for which the kernel has memory.

If the kernel merges file locks with other kinds of objects, these are included. Reading /proc/locks instead stops all
file locking on the machine until the programs that are changing a lock have finished, for up to a second if these
programs have little CPU time.
"""

_LOCK_SLAB = "file_lock_cache"
"""The kernel's name for file locks in slab statistics. A kernel that merges kinds of the same size does not show it."""

_LOCK_PAUSE_FACTOR = 10
"""Time between two counts of the machine's locks, as a multiple of the time that a count takes."""

_LISTED_LOCKS_MAX = 65_536
"""Maximum number of the machine's locks that are inspected, because the kernel walks the list for each 4 KiB of it."""

_IGNORED_ORPHANS_MAX = FILE_LOCKS_MAX // 16
"""While the machine has at most this many locks, orphans are not counted when a sandbox starts."""

_UNKNOWN_PIDS = ("-1", "0")
"""What the kernel shows as the process of an open file description lock, and of a process outside the pid namespace."""

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

    With many files, the numbers of directories and of locks on host files are estimates. The number of POSIX locks is a
    lower bound and never extrapolated, because one file can have all of them.
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
        posix_locks=locks.posix,
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


class LocksByOwner(NamedTuple):
    """File locks of a sandbox (`own`), and those that no running process took (`orphans`), including waiting locks."""

    own: int
    orphans: int


class FileLockMeter:
    """Counts the file locks of a sandbox while the machine has many, including those without an open descriptor.

    An orphan does not show which sandbox it belongs to. The sandbox is charged for orphans that appear while no other
    sandbox exists. Orphans of earlier sandboxes can remain until the host restarts.

    count_locks: takes 0.3 s for 60,000 locks.
    read_sibling_stamp: returns a number that changes whenever another sandbox starts or ends; None while one exists.
    """

    def __init__(
        self,
        slabs: SlabStatistics,
        count_locks: Callable[[], LocksByOwner],
        read_sibling_stamp: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slabs = slabs
        self._count_locks = count_locks
        self._read_sibling_changes = read_sibling_stamp
        self._clock = clock
        self._count: int | None = None
        self._next_at: float | None = None
        self._sibling_changes = read_sibling_stamp()
        self._charged_orphans = 0
        self._orphans = count_locks().orphans if (self._machine_locks() or 0) > _IGNORED_ORPHANS_MAX else 0
        """Number of orphans at the last count."""

    def count(self) -> int | None:
        """Return the number of locks; 0 while the machine has few; None if the kernel does not show their number.

        The locks are counted at most once in SLAB_INTERVAL_SECONDS, which takes at most a tenth of the time.
        """
        now = self._clock()
        if self._next_at is None or now >= self._next_at:
            self._count = self._read()
            self._next_at = now + max(SLAB_INTERVAL_SECONDS, _LOCK_PAUSE_FACTOR * (self._clock() - now))
        return self._count

    def _machine_locks(self) -> int | None:
        kinds = self._slabs.read()
        return None if kinds is None or _LOCK_SLAB not in kinds else kinds[_LOCK_SLAB].used

    def _read(self) -> int | None:
        machine_locks = self._machine_locks()
        if machine_locks is None:
            return None
        if machine_locks <= FILE_LOCKS_MAX + self._orphans - self._charged_orphans:
            return 0
        changes_before = self._read_sibling_changes()
        own, orphans = self._count_locks()
        if self._sibling_changes is not None and self._read_sibling_changes() == self._sibling_changes:
            self._charged_orphans += orphans - self._orphans
        self._charged_orphans = min(max(self._charged_orphans, 0), orphans)
        self._orphans, self._sibling_changes = orphans, changes_before
        return own + self._charged_orphans


def count_locks_by_owner(
    process_ids: Collection[int], locks: Path = _PROC_LOCKS, proc: Path = Path("/proc")
) -> LocksByOwner:
    """Count the file locks of a sandbox and the orphans.

    process_ids: the sandbox's processes. Locks on files of file systems that only the sandbox has mounted are the
    sandbox's, even if the process that took them has ended. At most _LISTED_LOCKS_MAX locks are inspected.
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
        return LocksByOwner(0, 0)
    names, own_devices = {str(pid) for pid in process_ids}, set[str]()
    if process_ids and (host_devices := _mounted_devices(proc / "1")):
        # All processes of a sandbox except the outer bwrap are in one mount namespace.
        first, last = min(process_ids), max(process_ids)
        own_devices = (_mounted_devices(proc / str(first)) | _mounted_devices(proc / str(last))) - host_devices
    own = orphans = 0
    for (name, device), count in counts.items():
        if name in names or device in own_devices:
            own += count
        elif name not in _UNKNOWN_PIDS and not (proc / name).exists():
            orphans += count
    return LocksByOwner(own, orphans)


def _mounted_devices(process: Path) -> set[str]:
    """Return the devices of the file systems that a process has mounted, as written in /proc/locks."""
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return set()
    numbers = (line.split(maxsplit=3)[2].split(":") for line in lines)
    return {f"{int(major):02x}:{int(minor):02x}" for major, minor in numbers}


def has_many_locks(capacity_file: Path = _LOCK_CAPACITY_FILE, locks: Path = _PROC_LOCKS) -> bool:
    """Return whether the machine may have so many file locks that a sandbox exceeds its limit."""
    capacity = _read_capacity(capacity_file)
    if capacity is not None:
        return capacity >= _FILE_LOCKS_OF_MACHINE_MIN
    try:
        with locks.open() as file:
            return sum(1 for _ in islice(file, _FILE_LOCKS_OF_MACHINE_MIN)) == _FILE_LOCKS_OF_MACHINE_MIN
    except OSError:
        return False


def _read_capacity(file: Path) -> int | None:
    """Return the number of objects in a `total_objects` file; None if it is unreadable."""
    try:
        return int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


_EPOLL_CAPACITY_FILE = Path("/sys/kernel/slab/eventpoll_epi/total_objects")
"""The number of entries, including free ones, for which the kernel has memory. It is read faster than slabinfo."""

_FEW_ENTRIES = EPOLL_ENTRIES_MAX // 8
"""Up to this capacity, the number of the machine's entries is taken as 0, because reading slabinfo takes 4 to 8 ms.

If the capacity exceeds this value later, entries that other programs had before the sandbox started count as growth
caused by the sandbox.
"""
_INSPECTION_SECONDS = 2.0
"""Maximum CPU time of one inspection. All open files are inspected, because one instance can have all the entries.

An inspection usually takes a few milliseconds, and 0.5 s for OPEN_FILES_OF_SANDBOX_MAX files. Many epoll instances take
longer.
"""

_IN_TRANSIT_COUNTS_MAX = 3
"""Number of consecutive counts with descriptors in transit after which the machine's new entries are attributed to the
sandbox, except those that other sandboxes show.

An epoll instance that is in transit in a Unix socket cannot be inspected. Ordinary programs receive such descriptors
quickly, so repeated counts rarely find any.
"""
_COMPARED_FILES_MAX = 8
"""Maximum number of instances to compare an instance with. With more, shared instances may be counted repeatedly."""

_KCMP_NUMBERS = {"x86_64": 312, "aarch64": 272}
_KCMP_FILE = 0
_HEADER_LINES = 16
"""Upper bound on the number of lines before the entries in a file of /proc/PID/fdinfo."""
_DESCRIPTORS_IN_TRANSIT = re.compile(r"^scm_fds:\s*([1-9]\d*)$", re.MULTILINE)


def count_machine_epoll_entries(slabs: Path = SLABS, capacity_file: Path = _EPOLL_CAPACITY_FILE) -> int | None:
    """Return the number of epoll entries of all processes on the machine; 0 if there are few.

    Returns None if it is unknown, for example because only root may read it.
    """
    if _has_few_entries(capacity_file):
        return 0
    return count_used_objects("eventpoll_epi", slabs)


def _has_few_entries(capacity_file: Path) -> bool:
    capacity = _read_capacity(capacity_file)
    return capacity is not None and capacity <= _FEW_ENTRIES


class EpollCounter:
    """Counts the epoll entries of one sandbox. was_cut_short: whether the last count took too long.

    initial_count: the machine's number of entries before the sandbox starts, if that was already counted.
    """

    def __init__(
        self, count_all: Callable[[], int | None] = count_machine_epoll_entries, *, initial_count: int | None = None
    ) -> None:
        self.was_cut_short = False
        self._count_all = count_all
        self._lowest = count_all() if initial_count is None else initial_count
        self._in_transit_counts = 0
        self._other_sandboxes = OtherSandboxMeasurement(_inspect)

    def count(
        self,
        process_ids: Collection[int],
        other_sandboxes: Callable[[], Iterable[Collection[int]]] = tuple,
    ) -> int:
        """Return the number of entries; 0 while the machine has too few for the sandbox to exceed its limit.

        Instances that only blocked threads keep open are not counted; see `PendingSyscallInterrupter`.

        other_sandboxes: returns the processes of each other sandbox. Entries of these processes are not attributed to
            this sandbox.
        """
        total = self._count_all()
        growth = 0
        if total is not None:
            self._lowest = min(total, total if self._lowest is None else self._lowest)
            growth = total - self._lowest
            if total <= EPOLL_ENTRIES_MAX:
                self._in_transit_counts, self.was_cut_short = 0, False
                return 0
        found = _inspect(process_ids)
        self.was_cut_short = found.was_cut_short
        self._in_transit_counts = (
            self._in_transit_counts + 1 if found.has_descriptors_in_transit and growth > EPOLL_ENTRIES_MAX else 0
        )
        if self._in_transit_counts >= _IN_TRANSIT_COUNTS_MAX:
            return max(found.entries, growth - self._sum_entries(other_sandboxes(), growth))
        return found.entries if total is None else min(found.entries, total)

    def _sum_entries(self, sandboxes: Iterable[Collection[int]], entries_max: int) -> int:
        """Return the number of visible entries of several sandboxes, at most `entries_max`.

        A sandbox that has too many entries, or cannot be inspected in time, counts for `entries_max`: it is ended by
        its own runner.
        """
        entries = 0
        for found in self._other_sandboxes.measure_all(sandboxes):
            if found is None or found.was_cut_short or found.entries > EPOLL_ENTRIES_MAX:
                return entries_max
            entries += found.entries
        return min(entries, entries_max)


class _Inspection(msgspec.Struct, frozen=True):
    """The entries of visible epoll instances, and whether descriptors are in transit between processes."""

    entries: int = 0
    has_descriptors_in_transit: bool = False
    was_cut_short: bool = False


def _inspect(process_ids: Collection[int]) -> _Inspection:
    deadline = time.thread_time() + _INSPECTION_SECONDS
    entries, has_descriptors_in_transit = 0, False
    sockets: set[str] = set()
    inherited = _InheritedFiles()
    for table, name, kind in _list_files(process_ids):
        if entries > EPOLL_ENTRIES_MAX or time.thread_time() > deadline:
            return _Inspection(entries, has_descriptors_in_transit, entries <= EPOLL_ENTRIES_MAX)
        with suppress(OSError):
            if kind == "anon_inode:[eventpoll]":
                with Path(f"{table}/fdinfo/{name}").open() as lines:
                    count = sum(line.startswith("tfd:") for line in islice(lines, EPOLL_ENTRIES_MAX + _HEADER_LINES))
                entries += 0 if inherited.is_known(table, name, count) else count
            elif kind.startswith("socket:") and not has_descriptors_in_transit and kind not in sockets:
                sockets.add(kind)
                has_descriptors_in_transit = (
                    _DESCRIPTORS_IN_TRANSIT.search(Path(f"{table}/fdinfo/{name}").read_text()) is not None
                )
    return _Inspection(entries, has_descriptors_in_transit)


class _InheritedFiles:
    """Recognizes instances that forked processes share: the descriptor has the same number in each."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._kcmp_number = _KCMP_NUMBERS.get(os.uname().machine)
        self._owners: dict[tuple[str, int], list[int]] = {}

    def is_known(self, table: str, name: str, entries: int) -> bool:
        """Return whether an already inspected process has this instance under the same number; False if unknown."""
        thread = int(table.rpartition("/")[2])
        owners = self._owners.setdefault((name, entries), [])
        if any(self._is_same(thread, owner, int(name)) for owner in owners):
            return True
        if len(owners) < _COMPARED_FILES_MAX:
            owners.append(thread)
        return False

    def _is_same(self, thread: int, other: int, descriptor: int) -> bool:
        if self._kcmp_number is None:
            return False
        numbers = (self._kcmp_number, thread, other, _KCMP_FILE, descriptor, descriptor)
        return bool(self._libc.syscall(*map(ctypes.c_long, numbers)) == 0)


def _list_files(process_ids: Collection[int]) -> Iterator[tuple[str, str, str]]:
    """Yield the descriptor table, the descriptor and its link target for each open file."""
    for table in filter(None, map(find_fd_table, process_ids)):
        for name in list_directory(f"{table}/fd"):
            with suppress(OSError):
                yield table, name, os.readlink(f"{table}/fd/{name}")  # noqa: PTH115  (Path takes three times as long)
