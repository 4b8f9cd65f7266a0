"""Makes what a sandbox causes in its runner wait while the runner's CPU budget is spent."""

import asyncio
import time
from collections.abc import Callable

from sandbox.model.cpu_budget import CpuBudget

_PAUSE_SECONDS_MIN = 0.005
"""A shorter pause would cost more than it saves."""


class CpuThrottle:
    """One for each runner. Everything that the process uses is charged, on whichever thread."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, cpu_seconds: Callable[[], float] = time.process_time
    ) -> None:
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds
        self._budget = CpuBudget(monotonic(), cpu_seconds())

    def queue(self, debt_seconds: float = 0.0) -> "CpuQueue":
        """For work of one priority: that with more debt goes on where other work waits."""
        return CpuQueue(self, debt_seconds)

    async def wait(self, debt_seconds: float) -> None:
        """Until work may go on that is allowed so much debt."""
        while True:
            self._budget.see(self._monotonic(), self._cpu_seconds())
            seconds = self._budget.wait_seconds(debt_seconds)
            if not seconds:
                return
            await asyncio.sleep(max(seconds, _PAUSE_SECONDS_MIN))


class CpuQueue:
    """`async with queue:` runs when it is its turn, in the order of coming, and there is budget for its priority."""

    def __init__(self, throttle: CpuThrottle, debt_seconds: float) -> None:
        self._throttle = throttle
        self._debt_seconds = debt_seconds
        self._first = asyncio.Lock()

    @property
    def is_waiting(self) -> bool:
        """Whether any work waits or runs in it."""
        return self._first.locked()

    async def __aenter__(self) -> None:
        await self._first.acquire()
        try:
            await self._throttle.wait(self._debt_seconds)
        except BaseException:
            self._first.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._first.release()

    async def wait(self) -> None:
        """Until it is its turn."""
        async with self:
            pass
