"""Delays the work that a sandbox causes in its runner while the runner's CPU budget is exhausted."""

import asyncio
import time
from collections.abc import Callable

from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS, RUNNER_CPU_CORES, RUNNER_CPU_DEBT_SECONDS_MAX


class CpuBudget:
    """A token bucket of CPU time: it refills over time, and all work in the process drains it. Starts full.

    Work with a higher priority may continue while the budget is in debt. Other work waits until the debt is paid.
    """

    def __init__(self, monotonic: float, cpu_seconds: float) -> None:
        self._balance_seconds = RUNNER_CPU_BURST_SECONDS
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds

    def update(self, monotonic: float, cpu_seconds: float) -> None:
        """Account for the elapsed time and the CPU time of the process since the last update."""
        gained = (monotonic - self._monotonic) * RUNNER_CPU_CORES
        level = min(self._balance_seconds + gained, RUNNER_CPU_BURST_SECONDS) - (cpu_seconds - self._cpu_seconds)
        self._balance_seconds = max(level, -RUNNER_CPU_DEBT_SECONDS_MAX)
        self._monotonic, self._cpu_seconds = monotonic, cpu_seconds

    def wait_seconds(self, debt_seconds: float = 0.0) -> float:
        """Return the seconds until work that is allowed this much debt may continue; 0 if it may continue now."""
        return max(0.0, -debt_seconds - self._balance_seconds) / RUNNER_CPU_CORES


_PAUSE_SECONDS_MIN = 0.005
"""A shorter pause would cost more than it saves."""


class CpuThrottle:
    """Throttles the work of one runner. Charges the CPU time of all threads of the process."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, cpu_seconds: Callable[[], float] = time.process_time
    ) -> None:
        self._monotonic = monotonic
        self._cpu_seconds = cpu_seconds
        self.start()

    def start(self) -> None:
        """Start with a full budget, because no sandbox caused the CPU time used until now."""
        self._budget = CpuBudget(self._monotonic(), self._cpu_seconds())

    def queue(self, debt_seconds: float = 0.0) -> "CpuQueue":
        """Create a queue for work of one priority. Work that is allowed more debt continues while other work waits."""
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
    """A FIFO queue: `async with queue:` waits until the caller is first and the budget allows the queue's priority."""

    def __init__(self, throttle: CpuThrottle, debt_seconds: float) -> None:
        self._throttle = throttle
        self._debt_seconds = debt_seconds
        self._turn = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether any work is waiting or running."""
        return self._turn.locked()

    async def __aenter__(self) -> None:
        await self._turn.acquire()
        try:
            await self._throttle.wait(self._debt_seconds)
        except BaseException:
            self._turn.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._turn.release()

    async def wait(self) -> None:
        """Wait until the caller is first and the budget allows the queue's priority, then leave the queue."""
        async with self:
            pass
