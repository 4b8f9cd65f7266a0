"""Kernel memory that no control group is charged for because most of it is idle.

The kernel charges objects and not the slabs that they are in. Whoever fills many slabs and frees all but one object of
each has given back most of the charge and little of the memory, and can do the same with objects of another kind.
Which sandbox idle objects come from cannot be seen. What comes is put down to each by the most that it was charged for,
beside what the others are charged for.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

_SLABS = Path("/proc/slabinfo")
_FLAGS = Path("/sys/kernel/slab")
_HEADER_LINES = 2
_INTERVAL_SECONDS = 1.0
"""Between two looks at all slabs of the machine, which takes some milliseconds each time."""

_KINDS = 16
"""A sandbox that was never charged for more than a part of so many of its bound is not over it: others are."""


def count_idle_bytes(slabs: Path = _SLABS, flags: Path = _FLAGS) -> int | None:
    """In free objects of the machine's slabs, but those that the kernel takes back. None where only root may look."""
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
    """Of a kind of objects: names of files and the like."""
    try:
        return (flags / name / "reclaim_account").read_text().strip() == "1"
    except OSError:
        return False


class IdleSlabMeter:
    """What of them is put down to one sandbox, from the first count on."""

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
        """charged: kernel memory of the sandbox; charged_to_all: of all sandboxes. None where it cannot be counted."""
        if charged is None:
            return None
        self._peak_charge_bytes = max(self._peak_charge_bytes, charged)
        if self._first is None or self._clock() - self._updated_at >= _INTERVAL_SECONDS:
            self._update(max(0, charged_to_all() - charged))
        return None if self._first is None else round(min(self._bytes, _KINDS * self._peak_charge_bytes))

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
