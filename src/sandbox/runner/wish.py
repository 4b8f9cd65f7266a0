"""The wish to end the attempt, as the steps see it."""

import asyncio

from sandbox.model.life import Effect, EndAttempt


class EndWish:
    """Set by effects, awaited by whoever is at work."""

    def __init__(self) -> None:
        self.made = asyncio.Event()
        self.forced = asyncio.Event()

    @property
    def is_forced(self) -> bool:
        """Without the grace between TERM and KILL."""
        return self.forced.is_set()

    def take(self, effect: Effect) -> None:
        """Carry out an effect of the recorder."""
        if isinstance(effect, EndAttempt):
            self.made.set()
            if effect.force:
                self.forced.set()
