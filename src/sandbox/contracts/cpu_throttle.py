"""Delays the work that a sandbox causes in its runner while the runner's CPU budget is exhausted."""

import asyncio
import time
from collections.abc import Callable

from sandbox.model.cpu_budget import CpuBudget

_PAUSE_SECONDS_MIN = 0.005
"""A shorter pause would cost more than it saves."""


class CpuThrottle:
    """One per runner. All CPU time of the process is charged, on whichever thread."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, cpu_seconds: Callable[[], float] = time.process_time
    ) -> None:
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds
        self.start()

    def start(self) -> None:
        """Begin with a full budget: what the process used until now was not caused by a sandbox."""
        self._budget = CpuBudget(self._monotonic(), self._cpu_seconds())

    def queue(self, debt_seconds: float = 0.0) -> "CpuQueue":
        """A queue for work of one priority. Work that is allowed more debt continues while other work waits."""
        return CpuQueue(self, debt_seconds)

    async def wait(self, debt_seconds: float) -> None:
        """Wait until work that is allowed this much debt may continue."""
        while True:
            self._budget.update(self._monotonic(), self._cpu_seconds())
            seconds = self._budget.wait_seconds(debt_seconds)
            if not seconds:
                return
            await asyncio.sleep(max(seconds, _PAUSE_SECONDS_MIN))


class CpuQueue:
    """First in, first out: `async with queue:` enters once it is first and the budget allows its priority."""

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
        """Wait for a turn, and give it up at once."""
        async with self:
            pass
