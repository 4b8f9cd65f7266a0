"""Measures the load of this machine."""

import os
from pathlib import Path

from sandbox.interfaces.server_services import HostLoad


def read_memory_available_bytes() -> int | None:
    """Return the memory available without swapping (proc(5), meminfo, MemAvailable); None if it is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def measure_host_load() -> HostLoad:
    """Read the CPU ticks and the memory of this host (proc(5), stat and meminfo). Raises OSError, ValueError."""
    with Path("/proc/stat").open() as lines:
        # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time.
        ticks = [int(field) for field in lines.readline().split()[1:9]]
    available = read_memory_available_bytes()
    if len(ticks) < 4 or available is None:
        raise ValueError("/proc/stat or /proc/meminfo has an unknown format")
    return HostLoad(
        cpu_busy_ticks=sum(ticks) - sum(ticks[3:5]),
        cpu_total_ticks=sum(ticks),
        memory_available_bytes=available,
        memory_total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
