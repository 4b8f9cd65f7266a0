"""Whether the file system of the data directory has room for output, as a runner sees it."""

import contextlib

from sandbox.contracts.clock import Clock
from sandbox.contracts.space import MeasureSpace
from sandbox.model.limits import SPACE_CHECK_SECONDS
from sandbox.model.watermark import Watermark


class HostSpace:
    """Looks when it is asked, and at most every SPACE_CHECK_SECONDS. What cannot be measured is as it was."""

    def __init__(self, measure: MeasureSpace, watermark: Watermark, clock: Clock) -> None:
        self._measure = measure
        self._watermark = watermark
        self._clock = clock
        self._is_short = False
        self._looks_at = float("-inf")

    def is_short(self) -> bool:
        """There is less than the watermark, or was until now and it is not clearly more yet."""
        now = self._clock.monotonic()
        if now >= self._looks_at:
            self._looks_at = now + SPACE_CHECK_SECONDS
            with contextlib.suppress(OSError):
                self._is_short = self._watermark.is_short(self._measure(), was_short=self._is_short)
        return self._is_short

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether so much is free now, or cannot be measured. For any thread."""
        try:
            return self._measure().free_bytes >= size_bytes
        except OSError:
            return True
