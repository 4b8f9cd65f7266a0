"""Whether the wall clock is believed when something is to be removed for good because of its age."""

from sandbox.contracts.clock import Clock
from sandbox.model.limits import CLOCK_JUMP_SECONDS, CLOCK_TRUST_SECONDS


class Calendar:
    """Believes a wall clock that has gone evenly for CLOCK_TRUST_SECONDS, as far as anybody has looked.

    A machine may boot with its clock months ahead, until a time server sets it. What is kept for less than that time
    is not worth the doubt.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begin()

    def is_believed(self, age_seconds: float) -> bool:
        """Whether what is older than this by the wall clock may be removed. Notices jumps since it was asked before."""
        even_seconds = self._clock.monotonic() - self._begun_at
        passed_seconds = (self._clock.now() - self._begun_on).total_seconds()
        if abs(passed_seconds - even_seconds) > CLOCK_JUMP_SECONDS:
            self._begin()
            even_seconds = 0.0
        return age_seconds < CLOCK_TRUST_SECONDS or even_seconds >= CLOCK_TRUST_SECONDS

    def _begin(self) -> None:
        self._begun_at, self._begun_on = self._clock.monotonic(), self._clock.now()
