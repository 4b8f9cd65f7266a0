"""Measures the CPU time that the kernel needs for the input of a sandbox's terminals.

Kernel threads process what programs write to the masters of pseudo-terminals. These threads are in no control group,
and each terminal can keep one thread busy. One byte can cost 20 µs: a reprint character repeats the whole line, and an
interrupt character signals all processes of the foreground group.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from sandbox.runtimes.limits.descriptor_tables import list_directory
from sandbox.runtimes.limits.measurement_threads import OtherSandboxMeasurement
from sandbox.runtimes.programs.launcher import PTYS_MAX

_PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_TERMINAL_FUNCTION = "flush_to_ldisc"
"""The kernel function that processes the input of a terminal. It is in the stack of a thread that does this."""

_TERMINAL_WRITE_FUNCTION = "tty_write"
"""Text that is in the name of each kernel function that writes to a terminal."""

_KERNEL_THREADS = Path("/proc/2/task/2/children")
_WORKER_PREFIX = "kworker/u"
"""Name prefix of kernel threads that are not bound to a processor. They process the input of terminals."""

_WRITTEN_SECONDS = 20.0
"""A write to a terminal counts as recent for this time. The kernel stores the time of a write in steps of 8 s."""

_TERMINAL_CPU_ALLOWANCE_CORES = 0.5
"""Cores of CPU time that kernel threads may spend on terminals before the time counts against a sandbox."""

_MULTIPLEXER = "ptmx"


class TerminalThreads:
    """The kernel threads that process the input of the machine's terminals."""

    def __init__(self, proc: Path = _PROC, listing: Path = _KERNEL_THREADS) -> None:
        self._proc = proc
        self._listing = listing
        self._cpu_seconds: dict[str, float] = {}

    def read_growth(self) -> float:
        """Return the CPU time that the threads now processing input have used since the last call; 0 if unknown.

        A thread that the last call did not find counts as 0.
        """
        earlier, self._cpu_seconds = self._cpu_seconds, {}
        with suppress(OSError):
            for thread in self._listing.read_text().split():
                self._add_cpu_seconds(thread)
        grown = {thread: now - earlier[thread] for thread, now in self._cpu_seconds.items() if thread in earlier}
        return sum(growth for thread, growth in grown.items() if growth > 0 and self._is_processing_input(thread))

    def _add_cpu_seconds(self, thread: str) -> None:
        with suppress(OSError, ValueError, IndexError):
            name, _, fields = (self._proc / thread / "stat").read_text().partition("(")[2].rpartition(") ")
            if name.startswith(_WORKER_PREFIX):
                self._cpu_seconds[thread] = sum(map(int, fields.split()[11:13])) / _TICKS_PER_SECOND

    def _is_processing_input(self, thread: str) -> bool:
        with suppress(OSError):
            return _TERMINAL_FUNCTION in (self._proc / thread / "stack").read_text()
        return False


def count_terminals_if_written(process_ids: Collection[int], proc: Path = _PROC) -> int:
    """Return the number of a sandbox's terminals; 0 if no program has written to any of them recently."""
    for pid in process_ids:
        directory = proc / str(pid) / "root/dev/pts"
        with suppress(OSError):
            terminals = sum(entry.name != _MULTIPLEXER for entry in directory.iterdir())
            if not terminals:
                return 0
            is_recent = time.time() - (directory / _MULTIPLEXER).stat().st_mtime <= _WRITTEN_SECONDS
            return terminals if is_recent or _has_pending_write(process_ids, proc) else 0
    return 0


def _has_pending_write(process_ids: Iterable[int], proc: Path) -> bool:
    """Return whether a thread is writing to a terminal. The kernel stores the time of a write only after the write."""
    for pid in process_ids:
        for thread in list_directory(f"{proc}/{pid}/task"):
            with suppress(OSError):
                if _TERMINAL_WRITE_FUNCTION in (proc / str(pid) / "task" / thread / "stack").read_text():
                    return True
    return False


class TerminalMeter:
    """Measures the CPU time of kernel threads that is attributed to the input of one sandbox's terminals."""

    def __init__(
        self,
        read_growth: Callable[[], float] | None = None,
        count_terminals: Callable[[Collection[int]], int] = count_terminals_if_written,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_growth = TerminalThreads().read_growth if read_growth is None else read_growth
        self._count_terminals = count_terminals
        self._other_sandboxes = OtherSandboxMeasurement(count_terminals)
        self._clock = clock
        self._measured_at = clock()
        self._is_writing = False
        self._excess_cpu_seconds = 0.0

    def measure(
        self,
        process_ids: Callable[[], Collection[int]],
        other_sandboxes: Callable[[], Iterable[Collection[int]]] = tuple,
    ) -> float:
        """Return the CPU time beyond _TERMINAL_CPU_ALLOWANCE_CORES, in seconds; 0 while nothing is written.

        The time is divided between the sandboxes that write to terminals, in proportion to their terminals.
        """
        now = self._clock()
        elapsed_seconds = now - self._measured_at
        was_writing, own = self._is_writing, self._count_terminals(process_ids())
        self._measured_at, self._is_writing = now, own > 0
        if not own:
            self._excess_cpu_seconds = 0.0
            return self._excess_cpu_seconds
        growth = self._read_growth()
        if was_writing and elapsed_seconds > 0:
            excess = growth - _TERMINAL_CPU_ALLOWANCE_CORES * elapsed_seconds
            total = own + self._count_terminals_of_others(other_sandboxes()) if excess > 0 else own
            self._excess_cpu_seconds = max(0.0, self._excess_cpu_seconds + excess * own / total)
        return self._excess_cpu_seconds

    def _count_terminals_of_others(self, sandboxes: Iterable[Collection[int]]) -> int:
        """Return the number of the other sandboxes' terminals; PTYS_MAX for each one whose programs delay the count."""
        counts = self._other_sandboxes.measure_all(sandboxes)
        return sum(PTYS_MAX if count is None else count for count in counts)
