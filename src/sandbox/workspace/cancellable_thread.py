"""Blocking work in a thread that ends soon after the task that waits for it is cancelled."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class WorkStoppedError(Exception):
    """The work was told to stop and did."""


class StopFlag:
    """A wish to stop. The work looks at it between files and between chunks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Wish it."""
        self._event.set()

    def raise_if_requested(self) -> None:
        """Raise StoppedError when somebody wished it."""
        if self._event.is_set():
            raise WorkStoppedError


async def run_in_thread(work: Callable[[StopFlag], T]) -> T:
    """Run `work` off the event loop. When cancelled, the thread has ended before CancelledError goes on."""
    stop = StopFlag()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.request()
        await asyncio.gather(running, return_exceptions=True)
        raise
