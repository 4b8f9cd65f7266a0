"""The time limits of an agent."""

import asyncio
from collections.abc import Callable

from sandbox.interfaces.clock import Clock
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Lifecycle


class TimeLimit:
    """Watches `lifecycle.timeout` and `lifecycle.hang_timeout`, using the monotonic clock.

    An agent counts as hung if it produces no output while `is_busy` returns False.
    """

    def __init__(self, lifecycle: Lifecycle, clock: Clock, is_busy: Callable[[], bool]) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._is_busy = is_busy
        self._last_active_at = clock.monotonic()

    def record_activity(self) -> None:
        """Restart the hang timeout."""
        self._last_active_at = self._clock.monotonic()

    async def watch(self, remaining_seconds: float) -> Failure:
        """Return the failure once a limit is exceeded. remaining_seconds: seconds left of `lifecycle.timeout`."""
        lifecycle, deadline = self._lifecycle, self._clock.monotonic() + remaining_seconds
        while True:
            now = self._clock.monotonic()
            if self._is_busy():
                self._last_active_at = now
            silence_end = self._last_active_at + lifecycle.hang_timeout_seconds
            if now >= deadline:
                message = f"The agent was still working after {lifecycle.timeout}; raise lifecycle.timeout."
                return Failure(FailureCode.TIMEOUT, message)
            if now >= silence_end:
                silence = lifecycle.hang_timeout
                message = f"The agent produced no output for {silence}; raise lifecycle.hang_timeout or retry."
                return Failure(FailureCode.HANG, message)
            await asyncio.sleep(min(deadline - now, silence_end - now, 1.0))
