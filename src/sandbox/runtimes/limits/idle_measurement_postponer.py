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

_CPU_TIME_POLL_SECONDS = KERNEL_USAGE_CHECK_INTERVAL_SECONDS - _TICK_SECONDS_MAX
"""Shorter than the interval between measurements, so that no violation is found later because of a postponed one."""

_POSTPONED_SECONDS_MAX = 1.0
_NOHZ_FULL_FILE = Path("/sys/devices/system/cpu/nohz_full")


class MeasurementPostponer:
    """Postpones the next measurement until the sandbox has used CPU time.

    read_sandbox_cpu_seconds: returns the CPU time since the sandbox was created; None if unknown.
    may_usage_change_while_idle: returns whether the next measurement may differ although no program has run.
    """

    def __init__(
        self,
        read_sandbox_cpu_seconds: Callable[[], float | None],
        may_usage_change_while_idle: Callable[[], bool] = lambda: False,
        nohz_full_file: Path = _NOHZ_FULL_FILE,
    ) -> None:
        self._read_sandbox_cpu_seconds = read_sandbox_cpu_seconds
        self._may_usage_change_while_idle = may_usage_change_while_idle
        self._is_cpu_time_reliable = _are_all_processors_ticking(nohz_full_file)
        self._cpu_seconds: float | None = None

    def record_cpu_time(self) -> None:
        """Record the CPU time that the sandbox has used so far. Call this before each measurement."""
        self._cpu_seconds = self._read_sandbox_cpu_seconds() if self._is_cpu_time_reliable else None

    async def wait_until_due(self) -> None:
        """Wait until the next measurement is due, at most 1 s. Returns immediately if the CPU time is unknown."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + _POSTPONED_SECONDS_MAX
        while not self._is_due():
            if (remaining_seconds := ends_at - loop.time()) <= 0:
                return
            await asyncio.sleep(min(_CPU_TIME_POLL_SECONDS, remaining_seconds))

    def _is_due(self) -> bool:
        if self._cpu_seconds is None or self._read_sandbox_cpu_seconds() != self._cpu_seconds:
            return True
        return self._may_usage_change_while_idle()


def _are_all_processors_ticking(nohz_full_file: Path) -> bool:
    """Return whether the kernel updates the CPU time of running programs at every tick, on all processors."""
    with suppress(OSError):
        return re.search(r"\d", nohz_full_file.read_text()) is None
    return True
