"""Interrupts threads that wait in a system call.

A system call keeps a file open until it returns, even if another thread closes the descriptor meanwhile. Such a file is
in no table of descriptors and cannot be counted. An interrupted call returns: the kernel restarts most of them with the
same descriptor, and others fail with EINTR, as they do when a process is stopped and continued.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from sandbox.model.limits import OPEN_FILES_GROWTH_MAX
from sandbox.runtimes.limits.kernel_usage import list_directory

_SEIZE, _INTERRUPT = 0x4206, 0x4207
_INTERRUPT_SECONDS = 0.02
"""Time for interrupted threads to leave their system calls before the machine's objects are counted again."""

_INTERVAL_SECONDS = 0.5
"""Interval between two counts of the machine's objects."""

_OPEN_FILES = Path("/proc/sys/fs/file-nr")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def interrupt_threads(process_ids: Iterable[int]) -> None:
    """Interrupt all threads of the processes. Does nothing to those that this process may not trace."""
    # The kernel stops tracing when the tracing thread ends. No thread is waited for, so none stays stopped.
    tracer = threading.Thread(target=_trace, args=(list(process_ids),), name="interrupt-threads")
    tracer.start()
    tracer.join()


def _trace(process_ids: Iterable[int]) -> None:
    for pid in process_ids:
        for thread in list_directory(f"/proc/{pid}/task"):
            if _libc.ptrace(_SEIZE, int(thread), None, None) == 0:
                _libc.ptrace(_INTERRUPT, int(thread), None, None)


def count_machine_files(path: Path = _OPEN_FILES) -> int | None:
    """Return the open files of all processes of the machine; None if it is unknown."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


class BlockedThreadInterrupter:
    """Interrupts one sandbox's blocked threads, which may hide objects, when the machine's number of objects has grown.

    count_all: counts these objects of the whole machine. growth_max: the growth above which threads are interrupted.
    """

    def __init__(
        self,
        count_all: Callable[[], int | None] = count_machine_files,
        growth_max: int = OPEN_FILES_GROWTH_MAX,
        interrupt: Callable[[Collection[int]], None] = interrupt_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_all = count_all
        self._growth_max = growth_max
        self._interrupt = interrupt
        self._clock = clock
        self._lowest = count_all()
        self._counted_at = clock()

    def interrupt_if_grown(self, process_ids: Collection[int]) -> None:
        """Interrupt the threads if the machine has many more objects than before."""
        if self._clock() - self._counted_at < _INTERVAL_SECONDS:
            return
        self._counted_at = self._clock()
        total = self._count_all()
        if total is None:
            return
        self._lowest = total if self._lowest is None else min(total, self._lowest)
        if total - self._lowest > self._growth_max:
            self._interrupt(process_ids)
            time.sleep(_INTERRUPT_SECONDS)
            after = self._count_all()
            self._lowest = total if after is None else min(total, after)
