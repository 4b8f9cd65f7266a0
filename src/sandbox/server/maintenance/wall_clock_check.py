"""Checks that the wall clock can be trusted before old data is removed."""

from sandbox.interfaces.clock import Clock
from sandbox.model.fixed_limits import CLOCK_JUMP_SECONDS, CLOCK_TRUST_SECONDS


class WallClockCheck:
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
