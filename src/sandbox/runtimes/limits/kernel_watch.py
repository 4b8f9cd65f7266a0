"""Polls the kernel resources that a sandbox uses on the host, with bounded CPU usage, and checks their limits."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from sandbox.model.fixed_limits import (
    FILE_USAGE_CHECK_INTERVAL_SECONDS,
    KERNEL_USAGE_CHECK_INTERVAL_SECONDS,
    TERMINAL_AND_LOCK_CHECK_INTERVAL_SECONDS,
    UNCHARGED_MEMORY_GROWTH_BYTES_MAX,
)
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.runtimes.limits.idle_measurement_postponer import MeasurementPostponer
from sandbox.runtimes.limits.kernel_usage import FileUsage, KernelUsage
from sandbox.runtimes.limits.measurement_threads import start_measurement

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
    postponer: postpones `kernel_usage` while no program of the sandbox runs; None to measure at the full rate.
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
    """Sleep until the memory has grown by more than UNCHARGED_MEMORY_GROWTH_BYTES_MAX since its lowest size.

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
        if current - lowest_bytes > UNCHARGED_MEMORY_GROWTH_BYTES_MAX and loop.time() - started_at >= seconds_min:
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
            # The kernel adds a wait to a thread's delay when the wait is over. The delay of an ended thread is kept.
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
