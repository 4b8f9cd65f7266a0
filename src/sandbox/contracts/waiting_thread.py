"""Work that may take long, in a thread that holds nothing up: not the event loop, not the program's end."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_in_thread(work: Callable[[], T]) -> T:
    """What `work` gives or raises. When cancelled, or when the program ends, the thread is left to itself."""
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(answered.set)

    threading.Thread(target=run, name="wait", daemon=True).start()
    await answered.wait()
    return done.result()
