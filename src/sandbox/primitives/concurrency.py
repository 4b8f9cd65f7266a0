"""Runs coroutines and blocking work concurrently, waits for descriptors, and stops threads on cancellation."""

import asyncio
import concurrent.futures
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import IO, Any, Generic, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


async def run_in_daemon_thread(work: Callable[[], T], on_exit: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a daemon thread; return its result or raise its exception.

    On cancellation or program exit, the thread is abandoned.

    on_exit: called once the thread has ended, even if no caller waits for it.

    Raises OSError (EAGAIN) if no thread can be started.
    """
    loop = asyncio.get_running_loop()
    finished = asyncio.Event()
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def end() -> None:
        finished.set()
        on_exit()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no caller waits
            loop.call_soon_threadsafe(end)

    try:
        threading.Thread(target=run, name="wait", daemon=True).start()
    except RuntimeError as error:
        on_exit()
        raise OSError(errno.EAGAIN, "The machine cannot start another thread") from error
    await finished.wait()
    return done.result()


@contextlib.asynccontextmanager
async def running_in_background(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run a coroutine as a task, which is cancelled at the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def wait_readable(watched: socket.socket | IO[bytes]) -> None:
    """Return once the socket or pipe is readable or at its end, or once a connection is waiting on the listener.

    Only one task can wait for an object; see `wait_readable_shared`.
    """
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(watched, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(watched)


async def wait_readable_shared(descriptor: int) -> None:
    """Wait until the descriptor is readable or, for a pidfd, the process has ended.

    Several tasks can wait at the same time.
    """
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    # An event loop keeps one reader per descriptor; a second one would replace it.
    duplicate_fd = os.dup(descriptor)
    loop.add_reader(duplicate_fd, _set_readable, readable)
    try:
        await readable
    finally:
        loop.remove_reader(duplicate_fd)
        os.close(duplicate_fd)


def _set_readable(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


async def accept_connection(listener: socket.socket) -> socket.socket:
    """Accept a connection on a listener that does not block. Raises OSError.

    If a caller is cancelled, no accepted connection is lost. The event loop's `sock_accept` can lose one, and it logs
    an error if the listener is closed at the same time.
    """
    while True:
        await wait_readable(listener)
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError):
            continue
        connection.setblocking(False)
        return connection


async def run_until_first_complete(*coroutines: Coroutine[Any, Any, T]) -> T:
    """Run the coroutines until one completes; return its result or raise its exception.

    The others are cancelled and have ended on return. If several complete at the same time, the first of them in the
    order of the arguments determines the result.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class KeyedLock:
    """One lock per name. A lock exists only while a caller holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock_for(self, name: str) -> asyncio.Lock:
        """Return the lock of this name."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock


class SingleFlight(Generic[T]):
    """Runs one measurement at a time; concurrent callers share the result.

    max_age_seconds: how long after the end of a measurement its result may be used.
    monotonic: returns seconds.
    """

    def __init__(
        self, measure: Callable[[], T], max_age_seconds: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._measure = measure
        self._max_age_seconds = max_age_seconds
        self._monotonic = monotonic
        self._running: asyncio.Task[T] | None = None
        self._ended_at = 0.0

    async def result(self) -> T:
        """Return the result of `measure`, or raise its error.

        If a call is cancelled, the measurement continues. The next caller gets its result unless it is too old.
        """
        if self._running is None or self._is_stale(self._running):
            self._running = asyncio.create_task(run_in_daemon_thread(self._measure), name="measure")
            self._running.add_done_callback(self._record_end)
        running = self._running
        try:
            return await asyncio.shield(running)
        finally:
            if running.done() and self._running is running:
                self._running = None

    def _record_end(self, _: "asyncio.Task[T]") -> None:
        self._ended_at = self._monotonic()

    def _is_stale(self, running: "asyncio.Task[T]") -> bool:
        """Return whether the measurement failed, or ended too long ago."""
        if not running.done():
            return False
        has_failed = running.cancelled() or running.exception() is not None
        return has_failed or self._monotonic() - self._ended_at > self._max_age_seconds


class WorkStoppedError(Exception):
    """The work stopped because a stop was requested."""


class StopFlag:
    """A request to stop. The work checks it between files and between chunks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Request the stop."""
        self._event.set()

    def raise_if_requested(self) -> None:
        """Raise WorkStoppedError if a stop was requested."""
        if self._event.is_set():
            raise WorkStoppedError


async def run_in_thread(work: Callable[[StopFlag], T]) -> T:
    """Run `work` in a thread. On cancellation the thread ends before CancelledError propagates."""
    stop = StopFlag()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.request()
        await asyncio.gather(running, return_exceptions=True)
        raise
