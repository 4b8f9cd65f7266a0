"""Runs coroutines and blocking work concurrently, and waits for sockets."""

import asyncio
import concurrent.futures
import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import IO, Any, TypeVar
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


async def wait_readable(watched: socket.socket | IO[bytes]) -> None:
    """Return once the socket or pipe is readable or at its end, or once a connection is waiting on the listener."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(watched, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(watched)


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

    The others are cancelled and have ended on return. If several complete at the same time, the one that comes first in
    the arguments counts.
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
