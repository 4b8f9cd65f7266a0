"""Samples of the load of the server and its host, kept in memory for the server page."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.server_services import HostLoad, LoadSample, MeasureHostLoad
from sandbox.model.fixed_limits import LOAD_SAMPLE_INTERVAL_SECONDS, LOAD_SAMPLES_MAX
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.tracked_task import TrackedTask

_log = logging.getLogger(__name__)


class LoadHistory:
    """The latest LOAD_SAMPLES_MAX samples; a new server starts without any."""

    def __init__(
        self,
        tracked_tasks: Mapping[str, TrackedTask],
        dispatcher: Dispatcher,
        disk_monitor: DiskMonitor,
        clock: Clock,
        measure: MeasureHostLoad,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._dispatcher = dispatcher
        self._disk_monitor = disk_monitor
        self._clock = clock
        self._measure = measure
        self._previous: HostLoad | None = None
        self._samples = deque[LoadSample](maxlen=LOAD_SAMPLES_MAX)

    def load_samples(self) -> Sequence[LoadSample]:
        """See `interfaces.server_services.ServerLoad.load_samples`."""
        return tuple(self._samples)

    async def run(self) -> None:
        """Add a sample periodically."""
        while True:
            try:
                self.add_sample()
            except (OSError, ValueError) as error:
                _log.warning("The load of the host cannot be measured: %s", error)
            await asyncio.sleep(LOAD_SAMPLE_INTERVAL_SECONDS)

    def add_sample(self) -> None:
        """Measure the host and count the tasks. Raises OSError, ValueError."""
        host = self._measure()
        previous, self._previous = self._previous, host
        occupancy, space = self._dispatcher.occupancy, self._disk_monitor.space
        unfinished = sum(not tracked.task.state.is_final for tracked in self._tracked_tasks.values())
        self._samples.append(
            LoadSample(
                at=self._clock.now(),
                cpu_percent=_cpu_percent(previous, host),
                memory_used_bytes=host.memory_total_bytes - host.memory_available_bytes,
                memory_total_bytes=host.memory_total_bytes,
                disk_used_bytes=space.total_bytes - space.free_bytes,
                disk_total_bytes=space.total_bytes,
                cpus=occupancy.cpus,
                cpus_reserved=occupancy.cpus_reserved,
                running=max(unfinished - occupancy.waiting, 0),
                waiting=occupancy.waiting,
            )
        )


def _cpu_percent(previous: HostLoad | None, current: HostLoad) -> float | None:
    """Return the combined usage of all CPUs since the previous sample; None if there is no previous sample."""
    if previous is None or current.cpu_total_ticks <= previous.cpu_total_ticks:
        return None
    busy = current.cpu_busy_ticks - previous.cpu_busy_ticks
    return round(100 * max(busy, 0) / (current.cpu_total_ticks - previous.cpu_total_ticks), 1)
