"""Postpones a measurement of a sandbox's kernel usage that cannot differ from the last one.

Programs cause what the limits bound, and the kernel charges their CPU time to the sandbox's control group. If the group
has used no CPU time at all since a measurement started, no program has made a system call, and no process has started
or ended. Some usage also changes without the programs: data arrives from the gateway, or other programs change the
machine's memory. A measurement of such usage is never postponed.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sandbox.model.fixed_limits import KERNEL_USAGE_CHECK_INTERVAL_SECONDS

_TICK_SECONDS_MAX = 0.01
"""The CPU time of a program that has just started to run is updated after this time, at the next tick."""

_CHECK_INTERVAL_SECONDS = KERNEL_USAGE_CHECK_INTERVAL_SECONDS - _TICK_SECONDS_MAX
"""Shorter than the interval between measurements, so that no violation is found later because of a postponed one."""

_POSTPONED_SECONDS_MAX = 1.0
_TICKLESS_PROCESSORS = Path("/sys/devices/system/cpu/nohz_full")


class CpuActivity:
    """Finds out when the next measurement is due, by the CPU time that the sandbox has used.

    read_cpu_seconds: returns the CPU time since the sandbox was created; None if unknown. is_measurement_due: returns
        whether the next measurement may differ although no program has run.
    """

    def __init__(
        self,
        read_cpu_seconds: Callable[[], float | None],
        is_measurement_due: Callable[[], bool] = lambda: False,
        tickless_processors: Path = _TICKLESS_PROCESSORS,
    ) -> None:
        self._read_cpu_seconds = read_cpu_seconds
        self._is_measurement_due = is_measurement_due
        self._is_cpu_time_current = _are_all_ticking(tickless_processors)
        self._cpu_seconds: float | None = None

    def start_measurement(self) -> None:
        """Call this before each measurement."""
        self._cpu_seconds = self._read_cpu_seconds() if self._is_cpu_time_current else None

    async def wait_until_due(self) -> None:
        """Wait until the next measurement is due, at most 1 s. Returns immediately if the CPU time is unknown."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + _POSTPONED_SECONDS_MAX
        while not self._is_due():
            if (remaining_seconds := ends_at - loop.time()) <= 0:
                return
            await asyncio.sleep(min(_CHECK_INTERVAL_SECONDS, remaining_seconds))

    def _is_due(self) -> bool:
        if self._cpu_seconds is None or self._read_cpu_seconds() != self._cpu_seconds:
            return True
        return self._is_measurement_due()


def _are_all_ticking(tickless_processors: Path) -> bool:
    """Return whether the kernel updates the CPU time of running programs at every tick, on all processors."""
    with suppress(OSError):
        return re.search(r"\d", tickless_processors.read_text()) is None
    return True
