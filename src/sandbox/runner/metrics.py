"""Samples of what a sandbox uses."""

import os

from sandbox.contracts.disks import DiskUse
from sandbox.contracts.runtime import Stats
from sandbox.model.event import Metrics


class MetricsSampler:
    """Turns the sandbox's counters into figures; CPU is the share of one processor since the last sample."""

    def __init__(self, memory_total_bytes: int) -> None:
        self._memory_total_bytes = memory_total_bytes
        self._last: tuple[float, float] | None = None

    def sample(self, stats: Stats, disk: DiskUse | None, monotonic: float) -> Metrics:
        """The figures at a moment."""
        return Metrics(
            cpu_percent=self._cpu_percent(stats.cpu_seconds, monotonic),
            memory_used_bytes=stats.memory_bytes,
            memory_total_bytes=self._memory_total_bytes,
            disk_used_bytes=disk.used_bytes if disk else None,
            disk_total_bytes=disk.total_bytes if disk else None,
            load_avg=round(os.getloadavg()[0], 2),
        )

    def _cpu_percent(self, cpu_seconds: float | None, monotonic: float) -> float | None:
        last, self._last = self._last, None if cpu_seconds is None else (cpu_seconds, monotonic)
        if cpu_seconds is None or last is None or monotonic <= last[1]:
            return None
        return round(max(cpu_seconds - last[0], 0.0) / (monotonic - last[1]) * 100, 1)
