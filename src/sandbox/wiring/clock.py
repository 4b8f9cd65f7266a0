"""The machine's clock."""

import time
from datetime import UTC, datetime


class SystemClock:
    """Implements `contracts.clock.Clock`."""

    def now(self) -> datetime:
        """UTC wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()
