"""An event loop in a thread.

The connections of workers and the engine run on it. Therefore `AttemptFiles`, whose methods block, can wait for a
worker in any other thread.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sandbox.interfaces.placement import HostUnreachableError

T = TypeVar("T")

_CLOSING_STEPS = 5
"""Number of event loop iterations within which an aborted connection is closed."""


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop's thread, and wait for its result. Raises OSError after `close`."""
        self._check_open(coroutine)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop's thread, and block until it returns.

        The coroutine must have a time limit. Raises OSError after `close`.
        """
        self._check_open(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def post(self, function: Callable[[], None]) -> None:
        """Call a function in the event loop's thread, and do not wait for it. Does nothing after `close`."""
        if not self._is_closing:
            self._loop.call_soon_threadsafe(function)

    def _check_open(self, coroutine: Coroutine[Any, Any, T]) -> None:
        if self._is_closing:
            coroutine.close()
            raise HostUnreachableError("cluster:")

    def close(self) -> None:
        """Cancel all tasks of the event loop, and end its thread. Idempotent."""
        self._is_closing = True
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _ in range(_CLOSING_STEPS):
        await asyncio.sleep(0)
