"""Measures the memory of files that ending processes are slow to close.

A process that ends gives up its descriptor table before the kernel closes its files. A program can delay this for
minutes by keeping a processor busy.
"""

import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.model.fixed_limits import CLOSING_FILES_BYTES_MAX
from sandbox.runtimes.limits.descriptor_tables import find_fd_table
from sandbox.runtimes.limits.kernel_memory_growth import KernelMemoryGrowth, count_machine_kernel_bytes
from sandbox.runtimes.limits.pending_syscalls import SyscallBufferMeter

_PROC = Path("/proc")
_FILES_OF_PROCESS_MAX, _FILE_BYTES_MAX = 16_384, 20 << 10
"""Limit on the open files of one process, and the maximum uncharged memory of one file (a partly read directory)."""

_CLOSING_SECONDS, _WAITING_SECONDS = 1.0, 5.0
"""How long a process must have been closing its files to be counted: if it is runnable, and if it waits.

A process that waits must take longer, because ordinary processes also wait for a slow disk.
"""

_CLOSING_TIME_SLICES = 2
"""Number of time slices that a runnable process must have had during that time to be counted.

In a time slice, it closes hundreds of files.
"""

_PF_EXITING, _ZOMBIE_STATES, _RUNNABLE = 0x4, "ZX", "R"
_PROCESS_ID = re.compile(r"^Tgid:\s*(\d+)$", re.MULTILINE)


class ClosingThread(msgspec.Struct, frozen=True):
    """A thread that has released its process's descriptor table, but has not ended.

    state: a letter as in /proc/PID/stat. start_time: a number as in that file, because ids are reused. time_slices: how
    many the thread has had. process_id: the id of its process.
    """

    state: str
    start_time: str
    time_slices: int
    process_id: str


def find_closing_thread(thread: int, proc: Path = _PROC) -> ClosingThread | None:
    """Return the thread if it is closing the files of its process; None for other threads."""
    directory = proc / str(thread)
    with suppress(OSError, ValueError, IndexError):
        # The name of a thread may contain any bytes.
        fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] in _ZOMBIE_STATES or not int(fields[6]) & _PF_EXITING or find_fd_table(thread) is not None:
            return None
        time_slices = int((directory / "schedstat").read_text().split()[2])
        process = _PROCESS_ID.search((directory / "status").read_text(errors="replace"))
        return ClosingThread(fields[0], fields[19], time_slices, process[1] if process else str(thread))
    return None


class ClosingFilesMeter:
    """Measures the memory of the files that ending processes are slow to close.

    Threads are inspected only while the machine's kernel memory has grown by more than the limit.
    """

    def __init__(
        self,
        count_kernel_bytes: Callable[[], int | None] = count_machine_kernel_bytes,
        find: Callable[[int], ClosingThread | None] = find_closing_thread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._growth = KernelMemoryGrowth(count_kernel_bytes, CLOSING_FILES_BYTES_MAX)
        self._find = find
        self._clock = clock
        self._first_seen: dict[int, tuple[float, ClosingThread]] = {}
        """When each thread that is closing files was first found, and its state at that time."""

    def measure(self, thread_ids: Callable[[], Collection[int]]) -> int | None:
        """Return an upper bound in bytes; 0 if the kernel's memory has not grown beyond the limit; None if unknown."""
        growth = self._growth.measure()
        if growth is None:
            return None
        if not growth:
            self._first_seen = {}
            return 0
        found = {thread: closing for thread in thread_ids() if (closing := self._find(thread)) is not None}
        now, earlier, self._first_seen = self._clock(), self._first_seen, {}
        for thread, closing in found.items():
            seen_at, first = earlier.get(thread, (now, closing))
            self._first_seen[thread] = (seen_at, first) if first.start_time == closing.start_time else (now, closing)
        slow = {one.process_id for thread, one in found.items() if self._is_slow(now, *self._first_seen[thread], one)}
        return min(growth, len(slow) * _FILES_OF_PROCESS_MAX * _FILE_BYTES_MAX)

    def may_measurement_differ(self, kernel_bytes: int | None) -> bool:
        """Return whether the next measurement may differ from the last one although no program of the sandbox has run.

        This is so while threads are closing files, because the time that they need counts. kernel_bytes: the current
        size of the kernel's memory; None if unknown.
        """
        return self._growth.has_newly_exceeded_limit(kernel_bytes) or bool(self._first_seen)

    @staticmethod
    def _is_slow(now: float, seen_at: float, first: ClosingThread, closing: ClosingThread) -> bool:
        """Return whether the thread needs more time than it would need for the files of an ordinary program."""
        if closing.state != _RUNNABLE:
            return now - seen_at >= _WAITING_SECONDS
        return now - seen_at >= _CLOSING_SECONDS and closing.time_slices - first.time_slices >= _CLOSING_TIME_SLICES


def may_any_measurement_differ(*meters: SyscallBufferMeter | ClosingFilesMeter | None) -> bool:
    """Return whether the next measurement of one of the meters may differ although no program has run. Takes 0.1 ms."""
    present = [one for one in meters if one is not None]
    kernel_bytes = count_machine_kernel_bytes() if present else None
    answers = [one.may_measurement_differ(kernel_bytes) for one in present]  # each meter must see each size
    return any(answers)
