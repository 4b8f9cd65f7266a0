"""Measurements that may take longer than whoever asks for one can wait."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from sandbox.contracts.waiting_thread import wait_in_thread

T = TypeVar("T")


class Measuring(Generic[T]):
    """One measurement at a time: who asks while one is under way gets what that gives."""

    def __init__(self, measure: Callable[[], T]) -> None:
        self._measure = measure
        self._running: asyncio.Task[T] | None = None

    async def result(self) -> T:
        """What `measure` gives or raises. Who is cancelled leaves it for the next who asks."""
        if self._running is None:
            self._running = asyncio.create_task(wait_in_thread(self._measure), name="measure")
        running = self._running
        try:
            return await asyncio.shield(running)
        finally:
            if running.done() and self._running is running:
                self._running = None
