"""Measures kernel time that a sandbox takes from the whole machine: locks that it holds, and terminal input.

While a program holds such a lock, it can wait for a processor, for pages of its own memory, or for another lock.
It shares `vm.cpus` with all other programs in its sandbox, and they can delay it for minutes.

- Terminals (tty_mutex): if 430 programs are busy and 40 others open terminals, a program on the host waits for more
  than a minute to open a terminal.
- Network devices (rtnl_mutex): the kernel holds the lock while it copies a list of interfaces into a program's memory,
  while a socket joins a multicast group, and while it answers a netlink request. Meanwhile, the machine can create no
  network namespace, so no sandbox can start.
- Nested epoll instances (epnested_mutex): the kernel holds the lock while it waits for the lock of an inner instance.
  It holds the inner lock while it copies events into a program's memory. Meanwhile, no program on the machine can add
  an epoll instance to another one, or any file to an instance that another one watches.
- Directories: the kernel holds the lock of a directory while it copies the names into a program's memory. If a program
  on the host wants to create a file in this directory, all programs that look up other names in it wait too.

Kernel threads process what programs write to the masters of pseudo-terminals. These threads are in no control group,
and each terminal can keep one thread busy. One byte can cost 20 µs: a reprint character repeats the whole line, and an
interrupt character signals all processes of the foreground group.
"""

import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.runtimes.limits.measurement_scheduling import OtherSandboxMeasurement
from sandbox.runtimes.limits.open_files import list_directory
from sandbox.runtimes.programs.launcher import PTYS_MAX

_PROC = Path("/proc")
_LOCK_WAIT_FUNCTION, _RUNNABLE = "mutex_lock", "R"
_WAITED_SECONDS_MIN = 1.0
"""Shorter waits do not count. Without programs that wait while they hold the lock, it is free within milliseconds."""

_RECOVERY_FACTOR = 0.25
"""While nobody waits for the lock, the measured time decreases by this multiple of the time that passes."""

_PAGE_FAULT_FUNCTIONS = ("page_fault", "handle_mm_fault", "lock_mm_and_find_vma", "gup_", "iov_iter_extract_pages")
"""Text in the stack of a thread that waits for a page of its own memory, or for the lock of its memory."""

_RECLAIM_FUNCTION = "try_to_free_mem_cgroup_pages"
"""Function in the stack of a thread that waits until the kernel has reclaimed memory of its sandbox."""

_LISTING_FUNCTION, _LOOKUP_FUNCTION = "ovl_iterate", "ovl_lookup"
_READ_FUNCTION, _DIRECT_READ_FUNCTIONS = "ovl_read_iter", ("iomap_dio", "direct_IO")
"""Text in the stack of a thread that uses a host directory, or reads a host file without the page cache.

The host's directories are visible through overlays. The task's disk is not an overlay. A read through the page cache
holds no lock while it waits.
"""

_INODE_LOCK_CHECK_INTERVAL_SECONDS = 1.0
_SIOCGIFCONF = 0x8912


def acquire_and_release_network_lock() -> None:
    """Request the size of the list of interfaces. The kernel holds the lock for network devices. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCGIFCONF, struct.pack("@iP", 0, 0))


def acquire_and_release_nested_epoll_lock() -> None:
    """Let one epoll instance watch another. Raises OSError."""
    with select.epoll() as outer, select.epoll() as inner:
        outer.register(inner.fileno(), select.EPOLLIN)


class KernelLock(msgspec.Struct, frozen=True):
    """A lock of the host's kernel.

    name: the name of the threads that probe the lock. acquire_and_release: takes about 20 µs; may raise OSError.
    functions: parts of the names of kernel functions that take the lock. They are in the stack of a thread that holds
    the lock or waits for it. holder_functions: the same for functions that only a thread with the lock executes. That
    thread may be waiting for another lock.
    """

    name: str
    acquire_and_release: Callable[[], object]
    functions: tuple[str, ...]
    holder_functions: tuple[str, ...] = ()


TERMINAL_LOCK = KernelLock(
    "terminal-lock",
    (_PROC / "tty/drivers").read_bytes,
    ("ptmx_open", "tty_open", "tty_release", "release_tty", " t_start+"),
)
"""The kernel holds the lock while it generates the content of /proc/tty/drivers, starting in t_start."""

NETWORK_LOCK = KernelLock(
    "network-lock",
    acquire_and_release_network_lock,
    (
        *("rtnl", "rtnetlink", "dev_ifconf", "dev_ioctl", "devinet_ioctl"),
        *("ip_setsockopt", "ip_getsockopt", "ipv6_setsockopt", "ipv6_getsockopt", "ip_mc_", "ipv6_sock_mc"),
    ),
)

NESTED_EPOLL_LOCK = KernelLock(
    "nested-epoll-lock", acquire_and_release_nested_epoll_lock, ("do_epoll_ctl",), ("ep_loop_check",)
)
"""ep_loop_check waits for the locks of inner instances.

Threads that hold only inner locks do not count, because the threads of ordinary event loops hold these too.
"""


class LockProbe:
    """Takes a lock repeatedly in its own thread, because a wait for the lock cannot be interrupted."""

    def __init__(self, lock: KernelLock) -> None:
        self._lock = lock
        self._thread: threading.Thread | None = None
        self._started_at = 0.0

    def measure_wait(self) -> float:
        """Return how long the probe has waited for the lock, in seconds; 0 if it is not waiting. Starts the next probe.

        A thread that waits for a processor, or for Python's own lock, is not waiting for the lock.
        """
        if self._thread is not None and self._thread.is_alive():
            waited_seconds = time.monotonic() - self._started_at
            return waited_seconds if waited_seconds < _WAITED_SECONDS_MIN or self._is_waiting_for_lock() else 0.0
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._probe, name=self._lock.name, daemon=True)
        self._thread.start()
        return 0.0

    def _is_waiting_for_lock(self) -> bool:
        """Return whether the probe's thread sleeps in one of the lock's functions."""
        with suppress(OSError, IndexError):
            directory = _PROC / "self/task" / str(self._thread.native_id if self._thread else None)
            stack = (directory / "stack").read_text(errors="replace")
            return _read_state(directory) != _RUNNABLE and any(name in stack for name in self._lock.functions)
        return False

    def _probe(self) -> None:
        with suppress(OSError):  # a kernel may be built without terminals
            self._lock.acquire_and_release()


class LockMeter:
    """Measures how long programs of one sandbox hold a lock while the machine waits for this lock."""

    def __init__(
        self,
        lock: KernelLock,
        measure_wait: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        proc: Path = _PROC,
    ) -> None:
        self._functions = lock.functions
        self._holder_functions = lock.holder_functions
        self._measure_wait = LockProbe(lock).measure_wait if measure_wait is None else measure_wait
        self._clock = clock
        self._proc = proc
        self._measured_at = clock()
        self._held_seconds = 0.0

    def measure(self, thread_ids: Callable[[], Collection[int]]) -> float:
        """Return the time in seconds. Reads files in /proc for each thread only while the probe waits."""
        now = self._clock()
        elapsed_seconds, self._measured_at = now - self._measured_at, now
        counted_seconds = min(elapsed_seconds, self._measure_wait() - _WAITED_SECONDS_MIN)
        if counted_seconds < 0:
            self._held_seconds = max(0.0, self._held_seconds - _RECOVERY_FACTOR * elapsed_seconds)
        elif any(self._may_hold_lock(thread) for thread in thread_ids()):
            self._held_seconds += counted_seconds
        return self._held_seconds

    def _may_hold_lock(self, thread: int) -> bool:
        """Return whether the thread is in one of the functions and is not waiting for a lock.

        A thread that was given the lock, and now waits for a processor, is runnable.
        """
        with suppress(OSError, IndexError):
            stack = _read_stack(self._proc, thread)
            if any(name in stack for name in self._holder_functions):
                return True
            if not any(name in stack for name in self._functions):
                return False
            return _read_state(self._proc / str(thread)) == _RUNNABLE or not self._waits_for_lock(stack)
        return False

    def _waits_for_lock(self, stack: str) -> bool:
        """Return whether a sleeping thread waits for a lock.

        Most kernels leave the functions of the scheduler and of locks out of the stack. The first function is then the
        one that takes the lock. A thread that waits for something else is in another function.
        """
        first = stack.partition("\n")[0]
        return _LOCK_WAIT_FUNCTION in stack or any(name in first for name in self._functions)


class HostInodeLockMeter:
    """Measures how long a thread of one sandbox waits for its own memory with the lock of a host file or directory.

    There is no probe, because the host has too many files. Instead, the threads are inspected once a second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, proc: Path = _PROC) -> None:
        self._clock = clock
        self._proc = proc
        self._measured_at = clock() - _INODE_LOCK_CHECK_INTERVAL_SECONDS
        self._waiting_since: dict[int, float] = {}

    def measure(self, thread_ids: Callable[[], Collection[int]]) -> float:
        """Return the longest time in seconds. Takes 10 ms for 500 threads."""
        now = self._clock()
        if now - self._measured_at >= _INODE_LOCK_CHECK_INTERVAL_SECONDS:
            self._measured_at = now
            waiting = filter(self._is_waiting_for_own_memory, thread_ids())
            self._waiting_since = {thread: self._waiting_since.get(thread, now) for thread in waiting}
        return max((self._measured_at - since for since in self._waiting_since.values()), default=0.0)

    def _is_waiting_for_own_memory(self, thread: int) -> bool:
        with suppress(OSError):
            stack = _read_stack(self._proc, thread)
            is_direct_read = _READ_FUNCTION in stack and any(name in stack for name in _DIRECT_READ_FUNCTIONS)
            is_reclaim = _RECLAIM_FUNCTION in stack
            is_page_fault = any(name in stack for name in _PAGE_FAULT_FUNCTIONS)
            if _LISTING_FUNCTION in stack or is_direct_read:
                return is_page_fault or is_reclaim
            return _LOOKUP_FUNCTION in stack and is_reclaim
        return False


def _read_stack(proc: Path, thread: int) -> str:
    return (proc / str(thread) / "stack").read_text()


def _read_state(thread_directory: Path) -> str:
    return (thread_directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]


class KernelLockMeters:
    """All meters of one sandbox."""

    def __init__(self) -> None:
        self.terminals = LockMeter(TERMINAL_LOCK)
        self.network_devices = LockMeter(NETWORK_LOCK)
        self.nested_epoll = LockMeter(NESTED_EPOLL_LOCK)
        self.host_inode_locks = HostInodeLockMeter()


_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_TERMINAL_FUNCTION = "flush_to_ldisc"
"""The kernel function that processes the input of a terminal. It is in the stack of a thread that does this."""

_TERMINAL_WRITE_FUNCTION = "tty_write"
"""Text that is in the name of each kernel function that writes to a terminal."""

_KERNEL_THREADS = Path("/proc/2/task/2/children")
_WORKER_PREFIX = "kworker/u"
"""Name prefix of kernel threads that are not bound to a processor. They process terminal input."""

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

    def read_new_cpu_seconds(self) -> float:
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
        read_new_cpu_seconds: Callable[[], float] | None = None,
        count_terminals: Callable[[Collection[int]], int] = count_terminals_if_written,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_new_cpu_seconds = (
            TerminalThreads().read_new_cpu_seconds if read_new_cpu_seconds is None else read_new_cpu_seconds
        )
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
        growth = self._read_new_cpu_seconds()
        if was_writing and elapsed_seconds > 0:
            excess = growth - _TERMINAL_CPU_ALLOWANCE_CORES * elapsed_seconds
            total = own + self._count_terminals_of_others(other_sandboxes()) if excess > 0 else own
            self._excess_cpu_seconds = max(0.0, self._excess_cpu_seconds + excess * own / total)
        return self._excess_cpu_seconds

    def _count_terminals_of_others(self, sandboxes: Iterable[Collection[int]]) -> int:
        """Return the number of the other sandboxes' terminals; PTYS_MAX for each one whose programs delay the count."""
        counts = self._other_sandboxes.measure_all(sandboxes)
        return sum(PTYS_MAX if count is None else count for count in counts)
