"""Runs blocking work in a thread that stops soon after the awaiting task is cancelled."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
