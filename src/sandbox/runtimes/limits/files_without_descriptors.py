"""Measures files and buffers that exist in the kernel although no descriptor table lists them, and interrupts calls.

A system call keeps a file open until it returns, even if another thread closes the descriptor in the meantime. Such a
file is in no descriptor table and cannot be counted. Interrupted calls return: the kernel restarts most of them with
the same descriptor, and others fail with EINTR, as they do when a process is stopped and continued.

A call may also use a buffer that is not charged to any control group. A program that reads a setting in /proc/sys or
sends a netlink request determines the size of this buffer. The program can make the call wait by causing a page fault
in its own memory.

A process that ends gives up its descriptor table before the kernel closes its files. A program can delay this for
minutes by keeping a processor busy.
"""

import ctypes
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.model.fixed_limits import (
    CLOSING_FILES_BYTES_MAX,
    OPEN_FILES_GROWTH_INTERRUPT_THRESHOLD,
    SYSCALL_BUFFER_BYTES_MAX,
)
from sandbox.runtimes.limits.kernel_memory import KernelMemoryGrowth, count_machine_unreclaimable_bytes
from sandbox.runtimes.limits.measurement_scheduling import run_observed_thread
from sandbox.runtimes.limits.open_files import find_fd_table, list_directory

_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207
_INTERRUPT_SECONDS = 0.02
"""Time for interrupted threads to leave their system calls before kernel objects are counted again."""

_COUNT_INTERVAL_SECONDS = 0.5
"""Interval at which the machine's kernel objects are counted."""

_OPEN_FILES = Path("/proc/sys/fs/file-nr")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def interrupt_threads(process_ids: Iterable[int]) -> None:
    """Interrupt all threads of the processes, except those that this process is not allowed to trace."""
    # The kernel stops tracing when the tracing thread ends, so no traced thread stays stopped.
    tracer = threading.Thread(target=_trace, args=(list(process_ids),), name="interrupt-threads")
    run_observed_thread(tracer)


def _trace(process_ids: Iterable[int]) -> None:
    for pid in process_ids:
        for thread in list_directory(f"/proc/{pid}/task"):
            if _libc.ptrace(_PTRACE_SEIZE, int(thread), None, None) == 0:
                _libc.ptrace(_PTRACE_INTERRUPT, int(thread), None, None)


def count_host_open_files(path: Path = _OPEN_FILES) -> int | None:
    """Return the number of open files of all processes on the machine; None if unknown."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


class PendingSyscallInterrupter:
    """Interrupts a sandbox's blocked threads, which may hide kernel objects, when the number of objects has grown.

    count_all: counts the objects on the whole machine. growth_max: the growth above which threads are interrupted.
    initial_count: the number of objects before the sandbox starts, if they were counted already.
    """

    def __init__(
        self,
        count_all: Callable[[], int | None] = count_host_open_files,
        growth_max: int = OPEN_FILES_GROWTH_INTERRUPT_THRESHOLD,
        interrupt: Callable[[Collection[int]], None] = interrupt_threads,
        clock: Callable[[], float] = time.monotonic,
        *,
        initial_count: int | None = None,
    ) -> None:
        self._count_all = count_all
        self._growth_max = growth_max
        self._interrupt = interrupt
        self._clock = clock
        self._lowest = count_all() if initial_count is None else initial_count
        self._counted_at = clock()

    def is_due(self) -> bool:
        """Return whether the next call of `interrupt_if_grown` counts the objects."""
        return self._clock() - self._counted_at >= _COUNT_INTERVAL_SECONDS

    def interrupt_if_grown(self, process_ids: Callable[[], Collection[int]]) -> None:
        """Interrupt the threads if the number of objects on the machine has grown by more than `growth_max`."""
        if not self.is_due():
            return
        self._counted_at = self._clock()
        total = self._count_all()
        if total is None:
            return
        self._lowest = total if self._lowest is None else min(total, self._lowest)
        if total - self._lowest > self._growth_max:
            self._interrupt(process_ids())
            time.sleep(_INTERRUPT_SECONDS)
            after = self._count_all()
            self._lowest = total if after is None else min(total, after)


_PROC = Path("/proc")
_SYSCTL_DIRECTORY = "/proc/sys/"
_SYSCTL_BUFFER_BYTES = 4 << 20
"""Maximum size of the buffer for one read of a setting: the kernel's KMALLOC_MAX_SIZE."""

_SYSCTL_FUNCTION, _NETLINK_FUNCTION = "proc_sys_call_handler", "netlink_sendmsg"
"""Kernel functions that allocate buffers of system calls. They are in the stack of a thread that has such a buffer."""

_RUNNING = "running"
_INODE_COLUMN = 9


def sum_syscall_buffer_bytes(process_ids: Iterable[int], proc: Path = _PROC) -> int:
    """Return an upper bound on the size of the kernel buffers for reads of /proc/sys and netlink requests, in bytes.

    The stack of a thread shows its call even if the descriptor has been closed. The stack of a thread that is
    running now may be missing, so the thread counts if its process has a file in /proc/sys or a netlink socket open.
    Returns 0 if there are too few threads to exceed the limit.
    """
    request_bytes = _read_number(proc / "sys/net/core/wmem_default")
    processes = [_ProcessCalls(proc / str(pid) / "task", request_bytes) for pid in process_ids]
    threads_min = SYSCALL_BUFFER_BYTES_MAX // max(_SYSCTL_BUFFER_BYTES, request_bytes)
    if sum(len(one.thread_directories) for one in processes) <= threads_min:
        return 0
    return sum(one.sum_buffer_bytes() for one in processes)


class _ProcessCalls:
    """The system calls that the threads of one process are executing.

    The first thread may have ended, so the files of all threads are read.

    task_directory: directory of the process's threads in /proc. request_bytes: size of the largest netlink request.
    """

    def __init__(self, task_directory: Path, request_bytes: int) -> None:
        self.thread_directories = [task_directory / name for name in list_directory(str(task_directory))]
        self._request_bytes = request_bytes
        self._largest_open: int | None = None
        self._netlink_sockets: frozenset[str] | None = None

    def sum_buffer_bytes(self) -> int:
        return sum(map(self._measure_thread, self.thread_directories))

    def _measure_thread(self, thread_directory: Path) -> int:
        return self._measure_stack(thread_directory) or self._measure_files(thread_directory)

    def _measure_stack(self, thread_directory: Path) -> int:
        with suppress(OSError):
            stack = (thread_directory / "stack").read_text()
            if _SYSCTL_FUNCTION in stack:
                return _SYSCTL_BUFFER_BYTES
            return self._request_bytes if _NETLINK_FUNCTION in stack else 0
        return 0

    def _measure_files(self, thread_directory: Path) -> int:
        with suppress(OSError, ValueError, IndexError):
            call = (thread_directory / "syscall").read_text().split()
            if call[0] != _RUNNING:
                return self._measure_file(thread_directory, str(int(call[1], 16)))
            if self._largest_open is None:
                names = list_directory(f"{thread_directory}/fd")
                self._largest_open = max((self._measure_file(thread_directory, name) for name in names), default=0)
            return self._largest_open
        return 0

    def _measure_file(self, thread_directory: Path, descriptor: str) -> int:
        with suppress(OSError):
            target = str((thread_directory / "fd" / descriptor).readlink())
            if target.startswith(_SYSCTL_DIRECTORY):
                return _SYSCTL_BUFFER_BYTES
            if self._netlink_sockets is None:
                self._netlink_sockets = _read_netlink_sockets(thread_directory / "net/netlink")
            return self._request_bytes if target in self._netlink_sockets else 0
        return 0


def _read_number(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _read_netlink_sockets(path: Path) -> frozenset[str]:
    """Return the link targets of the descriptors that refer to netlink sockets."""
    with suppress(OSError, IndexError):
        lines = path.read_text().splitlines()[1:]
        return frozenset(f"socket:[{line.split()[_INODE_COLUMN]}]" for line in lines)
    return frozenset()


class SyscallBufferMeter:
    """Measures the buffers of the system calls that a sandbox's threads are executing.

    Threads are inspected only while the machine's kernel memory has grown by more than the limit.
    """

    def __init__(
        self,
        count_kernel_bytes: Callable[[], int | None] = count_machine_unreclaimable_bytes,
        sum_buffers: Callable[[Collection[int]], int] = sum_syscall_buffer_bytes,
    ) -> None:
        self._growth = KernelMemoryGrowth(count_kernel_bytes, SYSCALL_BUFFER_BYTES_MAX)
        self._sum_buffers = sum_buffers

    def measure(self, process_ids: Callable[[], Collection[int]]) -> int | None:
        """Return the size in bytes; 0 if the kernel's memory has not grown beyond the limit; None if unknown."""
        growth = self._growth.measure()
        return min(growth, self._sum_buffers(process_ids())) if growth else growth

    def may_measurement_differ(self, kernel_bytes: int | None) -> bool:
        """Return whether the next measurement may differ from the last one although no program of the sandbox has run.

        kernel_bytes: the current size of the kernel's memory; None if unknown.
        """
        return self._growth.has_newly_exceeded_limit(kernel_bytes)


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
        count_kernel_bytes: Callable[[], int | None] = count_machine_unreclaimable_bytes,
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

        It may differ while threads are closing files, because the time that they take counts. kernel_bytes: the current
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
    kernel_bytes = count_machine_unreclaimable_bytes() if present else None
    answers = [one.may_measurement_differ(kernel_bytes) for one in present]  # each meter must record each size
    return any(answers)
