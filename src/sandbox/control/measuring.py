"""Measurements that may take longer than whoever asks for one can wait."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from sandbox.contracts.waiting_thread import wait_in_thread
from sandbox.model.limits import MEASUREMENT_KEPT_SECONDS

T = TypeVar("T")


class Measuring(Generic[T]):
    """One measurement at a time: who asks while one is under way gets what that gives.

    monotonic: gives seconds.
    """

    def __init__(self, measure: Callable[[], T], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._measure = measure
        self._monotonic = monotonic
        self._running: asyncio.Task[T] | None = None
        self._ended_at = 0.0

    async def result(self) -> T:
        """What `measure` gives or raises. Who is cancelled leaves it for the next who asks, unless that comes late."""
        if self._running is None or self._is_stale(self._running):
            self._running = asyncio.create_task(wait_in_thread(self._measure), name="measure")
            self._running.add_done_callback(self._note_end)
        running = self._running
        try:
            return await asyncio.shield(running)
        finally:
            if running.done() and self._running is running:
                self._running = None

    def _note_end(self, _: "asyncio.Task[T]") -> None:
        self._ended_at = self._monotonic()

    def _is_stale(self, running: "asyncio.Task[T]") -> bool:
        """Whether it failed, or ended long ago, while nobody waited for it."""
        if not running.done():
            return False
        has_failed = running.cancelled() or running.exception() is not None
        return has_failed or self._monotonic() - self._ended_at > MEASUREMENT_KEPT_SECONDS
