"""Who looks after what nobody else does, at the server's start and again and again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sandbox.interfaces.clock import Clock
from sandbox.model.limits import CLOCK_JUMP_SECONDS, CLOCK_TRUST_SECONDS, JANITOR_INTERVAL_SECONDS, PERIODIC_JOB_SECONDS

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeriodicJob:
    """Something to do in every round. It may be broken off at any await, and does what is left the next time.

    name: of what is looked after, for operators. mend: what they can do when it fails.
    """

    name: str
    run: Callable[[], Awaitable[None]]
    remedy: str


class Janitor:
    """Does its duties one after the other; none is kept from its turn by another."""

    def __init__(self, jobs: Sequence[PeriodicJob]) -> None:
        self._jobs = jobs

    async def run(self) -> None:
        """A round at once, and another one after each JANITOR_INTERVAL_SECONDS."""
        while True:
            await self.run_once()
            await asyncio.sleep(JANITOR_INTERVAL_SECONDS)

    async def run_once(self) -> None:
        """Every duty once. Never raises for what goes wrong in one."""
        for duty in self._jobs:
            try:
                async with asyncio.timeout(PERIODIC_JOB_SECONDS):
                    await duty.run()
            except Exception as error:
                reason = str(error) or type(error).__name__
                again = f"tried again in {JANITOR_INTERVAL_SECONDS / 60:.0f} minutes"
                _log.error("The janitor could not look after %s: %s; %s. %s", duty.name, reason, again, duty.remedy)


class ClockCheck:
    """Believes a wall clock that has gone evenly for CLOCK_TRUST_SECONDS, as far as anybody has looked.

    A machine may boot with its clock months ahead, until a time server sets it. What is kept for less than that time
    is not worth the doubt.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reset()

    def is_trusted(self, age_seconds: float) -> bool:
        """Whether what is older than this by the wall clock may be removed. Notices jumps since it was asked before."""
        even_seconds = self._clock.monotonic() - self._steady_since_monotonic
        passed_seconds = (self._clock.now() - self._steady_since).total_seconds()
        if abs(passed_seconds - even_seconds) > CLOCK_JUMP_SECONDS:
            self._reset()
            even_seconds = 0.0
        return age_seconds < CLOCK_TRUST_SECONDS or even_seconds >= CLOCK_TRUST_SECONDS

    def _reset(self) -> None:
        self._steady_since_monotonic, self._steady_since = self._clock.monotonic(), self._clock.now()
