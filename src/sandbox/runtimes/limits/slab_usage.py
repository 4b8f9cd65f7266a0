"""Measures kernel memory that no control group is charged for because most of it is idle.

The kernel charges objects, not the slabs that contain them. A program that fills many slabs and frees all but one
object of each gets most of the charge back but frees little memory, and can repeat this with other kinds of objects.
The origin of idle objects is not visible. Growth is therefore attributed to each sandbox in proportion to its peak
charge, relative to what the other sandboxes are charged for.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

_SLABS = Path("/proc/slabinfo")
_FLAGS = Path("/sys/kernel/slab")
_HEADER_LINES = 2
_INTERVAL_SECONDS = 1.0
"""Interval between two reads of all slabs of the machine, which take some milliseconds each."""

_PEAK_CHARGE_FACTOR = 16
"""Limit of the attributed bytes, as a multiple of the sandbox's peak charge.

A sandbox that was never charged for 1/16 of its limit has not exceeded it: the growth is due to others.
"""


def count_idle_bytes(slabs: Path = _SLABS, flags: Path = _FLAGS) -> int | None:
    """Return the bytes of free, unreclaimable objects in the machine's slabs; None if only root may read them."""
    try:
        lines = slabs.read_text().splitlines()[_HEADER_LINES:]
    except OSError:
        return None
    rows = [line.split(maxsplit=4) for line in lines]
    return sum(
        (int(objects) - int(active)) * int(size)
        for name, active, objects, size, _ in rows
        if not is_reclaimable(name, flags)
    )


@cache
def is_reclaimable(name: str, flags: Path) -> bool:
    """Return whether the kernel can reclaim objects of this kind, such as cached file names."""
    try:
        return (flags / name / "reclaim_account").read_text().strip() == "1"
    except OSError:
        return False


class IdleSlabMeter:
    """Idle slab bytes attributed to one sandbox since the first count."""

    def __init__(
        self,
        count_all: Callable[[], int | None] = count_idle_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_all = count_all
        self._clock = clock
        self._first: int | None = None
        self._last = 0
        self._updated_at = 0.0
        self._peak_charge_bytes = 0
        self._bytes = 0.0

    def count(self, charged: int | None, charged_to_all: Callable[[], int]) -> int | None:
        """Return the attributed bytes, or None if they cannot be measured.

        charged: kernel memory of the sandbox. charged_to_all: returns the kernel memory of all sandboxes.
        """
        if charged is None:
            return None
        self._peak_charge_bytes = max(self._peak_charge_bytes, charged)
        if self._first is None or self._clock() - self._updated_at >= _INTERVAL_SECONDS:
            self._update(max(0, charged_to_all() - charged))
        return None if self._first is None else round(min(self._bytes, _PEAK_CHARGE_FACTOR * self._peak_charge_bytes))

    def _update(self, charged_to_others: int) -> None:
        idle = self._count_all()
        self._updated_at = self._clock()
        if idle is None:
            return
        if self._first is None:
            self._first = self._last = idle
        share = self._peak_charge_bytes / max(1, self._peak_charge_bytes + charged_to_others)
        self._bytes += max(0, idle - self._last) * share
        self._bytes = min(self._bytes, max(0, idle - self._first))
        self._last = idle
