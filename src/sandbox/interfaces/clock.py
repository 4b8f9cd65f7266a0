"""Time, as something that is handed in."""

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """`now` is for people, `monotonic` for every bound."""

    def now(self) -> datetime:
        """UTC wall clock, time zone set."""
        ...

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        ...
