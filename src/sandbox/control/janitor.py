"""Who looks after what nobody else does, at the server's start and again and again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sandbox.model.limits import DUTY_SECONDS, JANITOR_INTERVAL_SECONDS

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Duty:
    """Something to do in every round. It may be broken off at any await, and does what is left the next time.

    name: of what is looked after, for operators. mend: what they can do when it fails.
    """

    name: str
    do: Callable[[], Awaitable[None]]
    mend: str


class Janitor:
    """Does its duties one after the other; none is kept from its turn by another."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._duties = duties

    async def run(self) -> None:
        """A round at once, and another one after each JANITOR_INTERVAL_SECONDS."""
        while True:
            await self.round()
            await asyncio.sleep(JANITOR_INTERVAL_SECONDS)

    async def round(self) -> None:
        """Every duty once. Never raises for what goes wrong in one."""
        for duty in self._duties:
            try:
                async with asyncio.timeout(DUTY_SECONDS):
                    await duty.do()
            except Exception as error:
                reason = str(error) or type(error).__name__
                again = f"tried again in {JANITOR_INTERVAL_SECONDS / 60:.0f} minutes"
                _log.error("The janitor could not look after %s: %s; %s. %s", duty.name, reason, again, duty.mend)
