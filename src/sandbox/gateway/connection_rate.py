"""How often a gateway opens connections. Each that it closes keeps a port of the machine for a minute (TIME_WAIT)."""

import asyncio
import time
from collections.abc import Callable


class Pace:
    """Allows something `at_once` times without waiting, and then `per_second` times a second; first in, first out."""

    def __init__(self, at_once: int, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._at_once = at_once
        self._per_second = per_second
        self._monotonic = monotonic
        self._left = float(at_once)
        self._counted_at = monotonic()
        self._first = asyncio.Lock()

    async def wait(self) -> None:
        """Return when it may be done once more."""
        async with self._first:
            await asyncio.sleep(self._wait_seconds())
            self._left -= 1

    def _wait_seconds(self) -> float:
        now = self._monotonic()
        self._left = min(self._left + (now - self._counted_at) * self._per_second, self._at_once)
        self._counted_at = now
        return max(0.0, 1 - self._left) / self._per_second
