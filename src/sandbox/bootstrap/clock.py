"""The host's clock and boot id. Runners import this module, so each of its imports slows their start."""

import time
from datetime import UTC, datetime
from pathlib import Path


def read_boot_id() -> str:
    """Return the boot id, which changes at every boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SystemClock:
    """Implements `interfaces.clock.Clock`."""

    def now(self) -> datetime:
        """Return the UTC wall clock time."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return the time of a monotonic clock in seconds."""
        return time.monotonic()
