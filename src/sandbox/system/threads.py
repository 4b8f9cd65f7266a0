"""Work that may take long, in a thread that holds nothing up: not the event loop, not the program's end."""

import asyncio
import concurrent.futures
import contextlib
import errno
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_in_daemon_thread(work: Callable[[], T], on_exit: Callable[[], None] = lambda: None) -> T:
    """What `work` gives or raises. When cancelled, or when the program ends, the thread is left to itself.

    leave: called once the thread has ended, whether somebody still waits for it or not. Raises OSError (EAGAIN) where
    the machine has no more threads.
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
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(end)

    try:
        threading.Thread(target=run, name="wait", daemon=True).start()
    except RuntimeError as error:
        on_exit()
        raise OSError(errno.EAGAIN, "The machine has no more threads") from error
    await finished.wait()
    return done.result()
