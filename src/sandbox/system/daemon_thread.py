"""Runs blocking work in a thread that delays neither the event loop nor the program's exit."""

import asyncio
import concurrent.futures
import contextlib
import errno
import threading
from collections.abc import Callable
from typing import TypeVar

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
