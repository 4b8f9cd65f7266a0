"""Decides when and in which threads a sandbox's kernel usage is measured, and checks its limits.

CPU usage: pauses between the measurements limit it.

Threads: the kernel makes a thread wait if a program holds a lock that the measurement needs. The program can hold the
lock for a long time, because it may wait for its own memory or for a processor. The lock may belong to the measured
sandbox or, if a measurement compares sandboxes, to another one.

Idle sandboxes: most usage changes only while programs run, and the kernel charges their CPU time to the sandbox's
control group. If the group has used no CPU time at all since a measurement started, no program has made a system call,
and no process has started or ended. The next measurement cannot differ and is postponed. Some usage also changes
without the programs: data arrives from the gateway, or other programs change the machine's memory. A measurement of
such usage is never postponed.
"""

import asyncio
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

from sandbox.model.fixed_limits import (
    EARLY_COUNT_MEMORY_GROWTH_BYTES,
    FILE_USAGE_CHECK_INTERVAL_SECONDS,
    KERNEL_USAGE_CHECK_INTERVAL_SECONDS,
    TERMINAL_AND_LOCK_CHECK_INTERVAL_SECONDS,
)
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage

P = ParamSpec("P")
T = TypeVar("T")

_OWN_THREADS = Path("/proc/self/task")
_FUTEX_NUMBERS = {"x86_64": "202", "aarch64": "98"}
_FUTEX = _FUTEX_NUMBERS.get(os.uname().machine, "")
"""Number of the system call in which a thread waits for Python's own lock."""

_RUNNABLE = "running"


class BlockedThreadDetector:
    """Shows whether the thread of one measurement sleeps. thread_id: None until the thread has started."""

    def __init__(self, threads: Path = _OWN_THREADS) -> None:
        self.thread_id: int | None = None
        self._threads = threads
        self._last: tuple[int | None, str, str] | None = None

    def observe(self, thread_id: int | None) -> int | None:
        """Observe this thread from now on. Returns the thread that was observed before."""
        previous, self.thread_id = self.thread_id, thread_id
        return previous

    def has_stayed_blocked(self) -> bool:
        """Return whether the thread has slept in one system call since this method was last called.

        Such a thread waited neither for a processor nor for other threads of this process. Returns False if unknown.
        """
        previous, self._last = self._last, self._read()
        return self._last is not None and self._last == previous

    def _read(self) -> tuple[int | None, str, str] | None:
        """Return the thread, the number of its time slices and its system call; None unless it sleeps in the kernel.

        The time slices come first: if the thread runs between the two reads, the next number differs.
        """
        thread_id = self.thread_id
        with suppress(OSError, IndexError):
            time_slices = (self._threads / str(thread_id) / "schedstat").read_text().split()[2]
            call = (self._threads / str(thread_id) / "syscall").read_text().split()[0]
            return None if call in (_RUNNABLE, _FUTEX) else (thread_id, time_slices, call)
        return None


_current_sleep: ContextVar[BlockedThreadDetector | None] = ContextVar("current_sleep", default=None)


def start_measurement(measure: Callable[[], Awaitable[T]]) -> tuple["asyncio.Future[T]", BlockedThreadDetector]:
    """Start a measurement, which calls `measure_in_thread`. Returns the measurement, and whether its thread sleeps."""
    sleep = BlockedThreadDetector()
    token = _current_sleep.set(sleep)
    try:
        return asyncio.ensure_future(measure()), sleep
    finally:
        _current_sleep.reset(token)


async def measure_in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. `start_measurement` observes the thread."""

    def run() -> T:
        if (sleep := _current_sleep.get()) is not None:
            sleep.observe(threading.get_native_id())
        return work(*args, **kwargs)

    return await asyncio.to_thread(run)


def run_observed_thread(thread: threading.Thread) -> None:
    """Start a thread and wait for its end. Meanwhile, it is the observed thread of the measurement."""
    thread.start()
    if (sleep := _current_sleep.get()) is None:
        thread.join()
        return
    own_id = sleep.observe(thread.native_id)
    thread.join()
    sleep.observe(own_id)


_OTHER_SANDBOXES_SECONDS = 2.0


class OtherSandboxMeasurement(Generic[T]):
    """Measures other sandboxes in one thread, and waits only a short time.

    A program in another sandbox can hold a lock that the measurement needs. The runner of that sandbox ends it; the
    sandbox of this runner must not be ended as well.

    measure: measures the sandbox with these processes. seconds: how long to wait for all measurements.
    """

    def __init__(self, measure: Callable[[Collection[int]], T], seconds: float = _OTHER_SANDBOXES_SECONDS) -> None:
        self._measure = measure
        self._seconds = seconds
        self._late: list[_MeasuringThread[T]] = []

    def measure_all(self, sandboxes: Iterable[Collection[int]]) -> Sequence[T | None]:
        """Return the result for each sandbox; None if it is late, or if an earlier measurement of it has not ended.

        The sandboxes after a late one are not measured in this call, so their results are None too. All results are
        None if no thread can be started.
        """
        self._late = [thread for thread in self._late if thread.is_alive()]
        all_ids = [frozenset(process_ids) for process_ids in sandboxes]
        measurable = [ids for ids in all_ids if all(late.current_ids.isdisjoint(ids) for late in self._late)]
        thread = _MeasuringThread(self._measure, measurable)
        try:
            thread.start()
        except RuntimeError:  # the machine has too many threads
            return [None] * len(all_ids)
        thread.join(self._seconds)
        if thread.is_alive():
            thread.is_abandoned = True
            self._late.append(thread)
        return [thread.results.get(ids) for ids in all_ids]


class _MeasuringThread(threading.Thread, Generic[T]):
    """Measures sandboxes in turn. is_abandoned: whether to stop after the current one."""

    def __init__(self, measure: Callable[[Collection[int]], T], sandboxes: Collection[frozenset[int]]) -> None:
        super().__init__(name="measure-others", daemon=True)
        self.current_ids: frozenset[int] = frozenset()
        self.results: dict[frozenset[int], T] = {}
        self.is_abandoned = False
        self._measure = measure
        self._sandboxes = sandboxes

    def run(self) -> None:
        for ids in self._sandboxes:
            if self.is_abandoned:
                return
            self.current_ids = ids
            self.results[ids] = self._measure(ids)


_TICK_SECONDS_MAX = 0.01
"""The CPU time of a program that has just started to run is updated after this time, at the next tick."""

_CPU_TIME_POLL_SECONDS = KERNEL_USAGE_CHECK_INTERVAL_SECONDS - _TICK_SECONDS_MAX
"""Shorter than the interval between measurements, so that no violation is found later because of a postponed one."""

_POSTPONED_SECONDS_MAX = 1.0
_NOHZ_FULL_FILE = Path("/sys/devices/system/cpu/nohz_full")


class MeasurementPostponer:
    """Postpones the next measurement until the sandbox has used CPU time.

    read_sandbox_cpu_seconds: returns the CPU time since the sandbox was created; None if unknown.
    may_usage_change_while_idle: returns whether the next measurement may differ although no program has run.
    """

    def __init__(
        self,
        read_sandbox_cpu_seconds: Callable[[], float | None],
        may_usage_change_while_idle: Callable[[], bool] = lambda: False,
        nohz_full_file: Path = _NOHZ_FULL_FILE,
    ) -> None:
        self._read_sandbox_cpu_seconds = read_sandbox_cpu_seconds
        self._may_usage_change_while_idle = may_usage_change_while_idle
        self._is_cpu_time_reliable = _are_all_processors_ticking(nohz_full_file)
        self._cpu_seconds: float | None = None

    def record_cpu_time(self) -> None:
        """Record the CPU time that the sandbox has used so far. Call this before each measurement."""
        self._cpu_seconds = self._read_sandbox_cpu_seconds() if self._is_cpu_time_reliable else None

    async def wait_until_due(self) -> None:
        """Wait until the next measurement is due, at most 1 s. Returns immediately if the CPU time is unknown."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + _POSTPONED_SECONDS_MAX
        while not self._is_due():
            if (remaining_seconds := ends_at - loop.time()) <= 0:
                return
            await asyncio.sleep(min(_CPU_TIME_POLL_SECONDS, remaining_seconds))

    def _is_due(self) -> bool:
        if self._cpu_seconds is None or self._read_sandbox_cpu_seconds() != self._cpu_seconds:
            return True
        return self._may_usage_change_while_idle()


def _are_all_processors_ticking(nohz_full_file: Path) -> bool:
    """Return whether the kernel updates the CPU time of running programs at every tick, on all processors."""
    with suppress(OSError):
        return re.search(r"\d", nohz_full_file.read_text()) is None
    return True


_PAUSE_FACTOR = 10
_PAUSE_SECONDS_MAX = 3.0
"""The pause after a measurement is this multiple of the CPU time that it used, up to the maximum.

Programs that keep all processors busy make a measurement take longer, but do not make the pause longer.
"""

_WAIT_SECONDS = 0.5
_WAITED_SECONDS_MAX = 5.0
_WAITS_MAX = 120
"""Limits on the waits for one measurement, which may need locks that programs inside hold.

Time in which threads of this process waited for a processor does not count, because the cause is a busy machine. The
times of all threads are added up, because the threads take turns. Some threads may do other work, so the number of
waits also limits one measurement. A wait always counts if the thread of the measurement slept in a system call
meanwhile: programs inside can keep the machine busy and hold a lock at the same time. A stop of the event loop, for
example while the machine is suspended, counts as one wait.
"""

_THREADS_DIRECTORY = "/proc/self/task"
_SCHEDSTAT_BYTES_MAX = 256


async def wait_for_exceeded_limit(
    kernel_usage: Callable[[], Awaitable[KernelUsage]],
    basic_file_usage: Callable[[], Awaitable[FileUsage]],
    detailed_file_usage: Callable[[], Awaitable[FileUsage]],
    kernel_bytes_outside_cgroup: Callable[[], int | None],
    terminal_usage: Callable[[], Awaitable[KernelUsage]] | None = None,
    kernel_lock_usage: Callable[[], Awaitable[KernelUsage]] | None = None,
    postponer: MeasurementPostponer | None = None,
) -> str:
    """Wait until the sandbox exceeds a limit; return why it must end. Each kind of usage is polled separately.

    Measuring one kind may take a long time and must not delay the others.

    kernel_bytes_outside_cgroup: returns the machine's kernel memory that is not charged to the sandbox's cgroup; None
        if unknown. If it grows, the files are counted early: partly read directories can use hundreds of MiB per
        second.
    terminal_usage, kernel_lock_usage: measure terminals and locks; None for confined programs, which have no
        terminals. While the kernel's threads for terminals keep all processors busy, each thread switch in the runner
        takes half a second. Never postponed: after a short write to a terminal, these threads can be busy for seconds,
        and a program that waits for a lock can get it, and hold it, without running. Measured separately: a program can
        block the list of its terminals while it holds a lock.
    postponer: postpones calls of `kernel_usage` while no program of the sandbox runs; None to measure at the full rate.
    """
    return await run_until_first_complete(
        *(
            _poll_for_violation(measure, TERMINAL_AND_LOCK_CHECK_INTERVAL_SECONDS)
            for measure in (terminal_usage, kernel_lock_usage)
            if measure is not None
        ),
        _poll_for_violation(kernel_usage, KERNEL_USAGE_CHECK_INTERVAL_SECONDS, postponer=postponer),
        _poll_for_violation(basic_file_usage, FILE_USAGE_CHECK_INTERVAL_SECONDS, kernel_bytes_outside_cgroup),
        _poll_for_violation(detailed_file_usage, FILE_USAGE_CHECK_INTERVAL_SECONDS),
    )


async def _poll_for_violation(
    measure: Callable[[], Awaitable[KernelUsage | FileUsage]],
    interval_seconds: float,
    kernel_bytes_outside_cgroup: Callable[[], int | None] = lambda: None,
    postponer: MeasurementPostponer | None = None,
) -> str:
    loop = asyncio.get_running_loop()
    while True:
        if postponer is not None:
            postponer.record_cpu_time()
        started_at, cpu_before, bytes_before = loop.time(), read_own_cpu_seconds(), kernel_bytes_outside_cgroup()
        usage = await _measure_in_time(measure)
        violation = _NOT_MEASURED_MESSAGE if usage is None else usage.find_exceeded_limit()
        if violation:
            return violation
        # An upper bound: other threads of this process may have used a part of the CPU time.
        measured_seconds = min(loop.time() - started_at, read_own_cpu_seconds() - cpu_before)
        pause_seconds = max(interval_seconds, min(_PAUSE_FACTOR * measured_seconds, _PAUSE_SECONDS_MAX))
        if bytes_before is None:
            await asyncio.sleep(pause_seconds)
        else:
            await _pause_until_grown(pause_seconds, measured_seconds, bytes_before, kernel_bytes_outside_cgroup)
        if postponer is not None and isinstance(usage, KernelUsage) and usage.is_bounded_while_idle:
            await postponer.wait_until_due()


async def _pause_until_grown(
    seconds: float, seconds_min: float, lowest_bytes: int, kernel_bytes_outside_cgroup: Callable[[], int | None]
) -> None:
    """Sleep until the memory has grown by more than EARLY_COUNT_MEMORY_GROWTH_BYTES since its lowest size.

    Sleeps for at least `seconds_min`, so that a program cannot make the runner count all the time, and for at most
    `seconds`.
    """
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    while (remaining_seconds := started_at + seconds - loop.time()) > 0:
        await asyncio.sleep(min(KERNEL_USAGE_CHECK_INTERVAL_SECONDS, remaining_seconds))
        current = kernel_bytes_outside_cgroup()
        if current is None:
            continue
        lowest_bytes = min(lowest_bytes, current)
        if current - lowest_bytes > EARLY_COUNT_MEMORY_GROWTH_BYTES and loop.time() - started_at >= seconds_min:
            return


_NOT_MEASURED_MESSAGE = (
    f"The sandbox's files and sockets could not be counted within {_WAITED_SECONDS_MAX:.0f} s; use fewer, or run the "
    "task on a machine that is less busy."
)


async def _measure_in_time(
    measure: Callable[[], Awaitable[KernelUsage | FileUsage]],
) -> KernelUsage | FileUsage | None:
    measurement, sleep = start_measurement(measure)
    first = read_run_delays()
    latest: dict[str, float] = {}
    slept_seconds = 0.0
    try:
        for count in range(1, _WAITS_MAX + 1):
            done, _ = await asyncio.wait([measurement], timeout=_WAIT_SECONDS)
            if done:
                return measurement.result()
            # The kernel adds a wait to a thread's delay when the wait ends. The delay of an ended thread is kept.
            latest |= read_run_delays()
            delayed_seconds = sum(max(0.0, delay - first.get(thread, 0.0)) for thread, delay in latest.items())
            slept_seconds += _WAIT_SECONDS if sleep.has_stayed_blocked() else 0.0
            if max(count * _WAIT_SECONDS - delayed_seconds, slept_seconds) >= _WAITED_SECONDS_MAX:
                return None
        return None
    finally:
        measurement.cancel()


def read_own_cpu_seconds() -> float:
    """Return the CPU time that this process has used."""
    return time.process_time()


def read_run_delays() -> dict[str, float]:
    """Return how long each thread of this process has waited for a processor, in seconds, keyed by thread id.

    Empty if the kernel does not measure them.
    """
    delays = {}
    with suppress(OSError), os.scandir(_THREADS_DIRECTORY) as threads:
        for thread in threads:
            with suppress(OSError, ValueError, IndexError):
                delays[thread.name] = int(_read_schedstat(thread.path).split()[1]) / 1e9
    return delays


def _read_schedstat(thread_directory: str) -> bytes:
    # `pathlib` takes several times as long, and this runs in each measurement for each thread.
    descriptor = os.open(f"{thread_directory}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _SCHEDSTAT_BYTES_MAX)
    finally:
        os.close(descriptor)
