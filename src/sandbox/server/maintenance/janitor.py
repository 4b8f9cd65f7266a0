"""The janitor: runs maintenance actions at the server's start and then periodically."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sandbox.model.fixed_limits import JANITOR_INTERVAL_SECONDS, MAINTENANCE_ACTION_TIMEOUT_SECONDS

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
