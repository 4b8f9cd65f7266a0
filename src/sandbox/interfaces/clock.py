"""The clock interface, for injection."""

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """`now` is for display, and `monotonic` is for time limits."""

    def now(self) -> datetime:
        """Return the UTC wall clock time, with time zone."""
        ...

    def monotonic(self) -> float:
        """Return the monotonic time in seconds."""
        ...
