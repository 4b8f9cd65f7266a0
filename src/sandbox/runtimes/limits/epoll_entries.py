"""Counts the entries of a sandbox's epoll instances.

An event on a file wakes all of the file's epoll entries at once, with interrupts disabled, which takes about 0.12 µs
for each entry. If a timer causes the event, this happens in an interrupt, which is not charged to any control group.
There can be more entries than descriptors, because each pair of an epoll instance and a descriptor is an entry. The
kernel's limit (`fs.epoll.max_user_watches`) is in the millions.
"""

import ctypes
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

from sandbox.model.fixed_limits import EPOLL_ENTRIES_MAX
from sandbox.runtimes.limits.descriptor_tables import find_fd_table, list_directory
from sandbox.runtimes.limits.measurement_threads import OtherSandboxMeasurement
from sandbox.runtimes.limits.slab_usage import SLABS, count_used_objects

_CAPACITY_FILE = Path("/sys/kernel/slab/eventpoll_epi/total_objects")
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
"""Number of consecutive counts with descriptors in transit after which all entries are attributed to the sandbox.

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


def count_machine_entries(slabs: Path = SLABS, capacity_file: Path = _CAPACITY_FILE) -> int | None:
    """Return the number of epoll entries of all processes on the machine; 0 if there are few.

    Returns None if only root may read it.
    """
    if _has_few_entries(capacity_file):
        return 0
    return count_used_objects("eventpoll_epi", slabs)


def _has_few_entries(capacity_file: Path) -> bool:
    try:
        return int(capacity_file.read_text().split()[0]) <= _FEW_ENTRIES
    except (OSError, ValueError, IndexError):
        return False


class EpollCounter:
    """Counts the epoll entries of one sandbox. was_cut_short: whether the last count took too long.

    initial_count: the machine's number of entries before the sandbox starts, if that was already counted.
    """

    def __init__(
        self, count_all: Callable[[], int | None] = count_machine_entries, *, initial_count: int | None = None
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
