"""Runs measurements of sandboxes in threads.

The kernel makes a thread wait if a program holds a lock that the measurement needs. The program can hold the lock for a
long time, because it may wait for its own memory or for a processor. The lock may belong to the measured sandbox or, if
a measurement compares sandboxes, to another one.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

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

    A program in another sandbox can hold a lock that the measurement needs. The runner of that sandbox ends it, and the
    sandbox of this runner must not end with it.

    measure: measures the sandbox with these processes. seconds: how long to wait for all measurements.
    """

    def __init__(self, measure: Callable[[Collection[int]], T], seconds: float = _OTHER_SANDBOXES_SECONDS) -> None:
        self._measure = measure
        self._seconds = seconds
        self._late: list[_MeasuringThread[T]] = []

    def measure_all(self, sandboxes: Iterable[Collection[int]]) -> Sequence[T | None]:
        """Return the result for each sandbox; None if it is late, or if an earlier measurement of it has not ended.

        The sandboxes after a late one are not measured in this call.
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
