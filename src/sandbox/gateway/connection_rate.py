"""Rate limit for outbound connections. Each closed connection occupies a local port for a minute (TIME_WAIT)."""

import asyncio
import time
from collections.abc import Callable


class ConnectionRateLimiter:
    """Token bucket: allows `burst` acquisitions at once, then `per_second` per second, in FIFO order."""

    def __init__(self, burst: int, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._counted_at = monotonic()
        self._queue_lock = asyncio.Lock()

    async def wait(self) -> None:
        """Wait for a token and take it."""
        async with self._queue_lock:
            await asyncio.sleep(self._wait_seconds())
            self._tokens -= 1

    def _wait_seconds(self) -> float:
        now = self._monotonic()
        self._tokens = min(self._tokens + (now - self._counted_at) * self._per_second, self._burst)
        self._counted_at = now
        return max(0.0, 1 - self._tokens) / self._per_second
