"""Counts the entries of a sandbox's epoll instances.

An event wakes all epoll entries of its file at once, with interrupts off: about 0.12 µs for each. If a timer is the
cause, this happens in an interrupt, which is charged to nobody. Files can have more entries than there are descriptors,
because each pair of epoll instance and descriptor is one. The kernel's bound (`fs.epoll.max_user_watches`) is millions.
"""

import random
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path

from sandbox.model.limits import EPOLL_ENTRIES_MAX
from sandbox.runtimes.limits.kernel_usage import find_fd_table, list_directory

_SLABS = Path("/proc/slabinfo")
_ACTIVE_ENTRIES = re.compile(r"^eventpoll_epi +(\d+) ", re.MULTILINE)
_SAMPLE_SIZE_MAX = 4096
"""Number of open files to inspect; a larger set is sampled at random each time."""

_HIDDEN_COUNTS_MAX = 3
"""Consecutive counts with descriptors in transit after which the machine's entries are attributed to the sandbox.

An epoll instance that is in transit in a Unix socket cannot be inspected. Programs receive what others send them, so
repeated counts rarely find any.
"""
_HEADER_LINES = 16
"""More than the lines before the entries in /proc/PID/fdinfo."""
_TRANSIT = re.compile(r"^scm_fds:\s*([1-9]\d*)$", re.MULTILINE)


def count_machine_entries(slabs: Path = _SLABS) -> int | None:
    """Return the epoll entries of all processes of the machine, or None if only root may read their number."""
    try:
        match = _ACTIVE_ENTRIES.search(slabs.read_text())
    except OSError:
        return None
    return int(match[1]) if match else None


class EpollCounter:
    """Counts the epoll entries of one sandbox."""

    def __init__(self, count_all: Callable[[], int | None] = count_machine_entries) -> None:
        self._count_all = count_all
        self._lowest = count_all()
        self._hidden_counts = 0

    def count(self, process_ids: Collection[int]) -> int:
        """Return the number of entries; 0 while the machine has too few for the sandbox to exceed its limit.

        Of many open files, a random sample is inspected and the number is an estimate.
        """
        total = self._count_all()
        growth = 0
        if total is not None:
            self._lowest = min(total, total if self._lowest is None else self._lowest)
            growth = total - self._lowest
            if total <= EPOLL_ENTRIES_MAX:
                self._hidden_counts = 0
                return 0
        entries, is_hidden = _inspect(process_ids)
        self._hidden_counts = self._hidden_counts + 1 if is_hidden and growth > EPOLL_ENTRIES_MAX else 0
        if self._hidden_counts >= _HIDDEN_COUNTS_MAX:
            return max(entries, growth)
        return entries if total is None else min(entries, total)


def _inspect(process_ids: Collection[int]) -> tuple[int, bool]:
    """Return the entries of the processes' epoll instances, and whether descriptors are in transit between them."""
    tables = [table for pid in process_ids if (table := find_fd_table(pid))]
    files = [f"{table}/{{}}/{name}" for table in tables for name in list_directory(f"{table}/fd")]
    sample = random.sample(files, min(len(files), _SAMPLE_SIZE_MAX))
    entries, is_hidden = 0, False
    for file in sample:
        with suppress(OSError):
            kind = Path(file.format("fd")).readlink().name
            if kind == "anon_inode:[eventpoll]":
                with Path(file.format("fdinfo")).open() as lines:
                    entries += sum(line.startswith("tfd:") for line in islice(lines, EPOLL_ENTRIES_MAX + _HEADER_LINES))
            elif kind.startswith("socket:"):
                is_hidden = is_hidden or _TRANSIT.search(Path(file.format("fdinfo")).read_text()) is not None
        if entries > EPOLL_ENTRIES_MAX:
            break
    return round(entries * len(files) / max(1, len(sample))), is_hidden
