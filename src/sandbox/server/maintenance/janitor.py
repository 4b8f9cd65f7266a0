"""The janitor: runs maintenance actions at the server's start and then periodically."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sandbox.interfaces.clock import Clock
from sandbox.model.fixed_limits import (
    CLOCK_JUMP_SECONDS,
    CLOCK_TRUST_SECONDS,
    JANITOR_INTERVAL_SECONDS,
    MAINTENANCE_ACTION_TIMEOUT_SECONDS,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaintenanceAction:
    """An action of the janitor. It may be cancelled at any await; its next run must then do the rest of the work.

    name: what the action removes or changes, for operators.
    remedy: what operators can do if it fails.
    """

    name: str
    run: Callable[[], Awaitable[None]]
    remedy: str


class Janitor:
    """Runs its actions one after the other. A failed action does not stop the others."""

    def __init__(self, actions: Sequence[MaintenanceAction]) -> None:
        self._actions = actions

    async def run(self) -> None:
        """Run all actions now, and again after each JANITOR_INTERVAL_SECONDS."""
        while True:
            await self.run_once()
            await asyncio.sleep(JANITOR_INTERVAL_SECONDS)

    async def run_once(self) -> None:
        """Run every action once. Failures are only logged."""
        for action in self._actions:
            try:
                async with asyncio.timeout(MAINTENANCE_ACTION_TIMEOUT_SECONDS):
                    await action.run()
            except Exception as error:
                reason = str(error) or type(error).__name__
                again = f"retrying in {JANITOR_INTERVAL_SECONDS / 60:.0f} minutes"
                _log.error("Maintenance of %s failed: %s; %s. %s", action.name, reason, again, action.remedy)


class ClockCheck:
    """Trusts the wall clock once it has not jumped for CLOCK_TRUST_SECONDS.

    A host may boot with its clock months ahead, until a time server corrects the clock. The clock is not checked for
    data that is kept for less than CLOCK_TRUST_SECONDS.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reset()

    def is_trusted(self, age_seconds: float) -> bool:
        """Return whether data older than `age_seconds`, by the wall clock, may be removed.

        Detects clock jumps between calls.
        """
        steady_seconds = self._clock.monotonic() - self._steady_since_monotonic
        passed_seconds = (self._clock.now() - self._steady_since).total_seconds()
        if abs(passed_seconds - steady_seconds) > CLOCK_JUMP_SECONDS:
            self._reset()
            steady_seconds = 0.0
        return age_seconds < CLOCK_TRUST_SECONDS or steady_seconds >= CLOCK_TRUST_SECONDS

    def _reset(self) -> None:
        self._steady_since_monotonic, self._steady_since = self._clock.monotonic(), self._clock.now()
