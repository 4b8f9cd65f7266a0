"""Services for the operator of the server: health, load, hosts, draining and pruning."""

import asyncio
import dataclasses
import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from sandbox import __version__
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.placement import HostAllocator, HostNotFoundError, HostState, HostStatus
from sandbox.interfaces.server_services import (
    DrainStatus,
    Health,
    HostLoad,
    HostWithTasks,
    LoadSample,
    MeasureHostLoad,
    PruneResult,
    Retention,
    UnavailableError,
)
from sandbox.interfaces.store import Store, StoreError
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import LOAD_SAMPLE_INTERVAL_SECONDS, LOAD_SAMPLES_MAX
from sandbox.model.task_state import TaskState
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.placements import Placements, ProbedHost, attempt_location
from sandbox.server.pruning import Pruner
from sandbox.server.start_conditions import DiskMonitor, Drain, StartConditions
from sandbox.server.tracked_task import TrackedTask, TrackedTasks


class HealthCheck:
    """Creates the health report. Each call to `run` measures the free disk space and counts the tasks again."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        conditions: StartConditions,
        disk_monitor: DiskMonitor,
        drain: Drain,
        host: ProbedHost,
    ) -> None:
        self._store = store
        self._clock = clock
        self._conditions = conditions
        self._disk_monitor = disk_monitor
        self._drain = drain
        self._host = host
        self._started_at = clock.monotonic()

    def run(self) -> Health:
        """Return the report. `reasons` say why tasks cannot be accepted or run."""
        counts = self._count_by_state()
        reasons = [*self._conditions.blocking_reasons()]
        if counts is None:
            reasons.append("The index of tasks cannot be read.")
        return Health(
            version=__version__,
            uptime_seconds=self._clock.monotonic() - self._started_at,
            tasks_by_state=counts or {},
            runtimes=self._host.result.probes,
            next_probe_at=self._host.next_probe_at,
            retry_after_seconds=self._host.retry_after_seconds,
            is_store_ok=counts is not None,
            disk_free_bytes=self._disk_monitor.space.free_bytes,
            disk_total_bytes=self._disk_monitor.space.total_bytes,
            draining_since=self._drain.since,
            is_ready=not reasons,
            reasons=reasons,
        )

    def _count_by_state(self) -> Mapping[TaskState, int] | None:
        try:
            return self._store.count_by_state()
        except (OSError, StoreError):
            return None


class Hosts:
    """Implements `interfaces.server_services.Hosts`."""

    def __init__(self, tracked_tasks: TrackedTasks, placements: Placements) -> None:
        self._tracked_tasks = tracked_tasks
        self._placements = placements

    @property
    def has_cluster(self) -> bool:
        """See `interfaces.server_services.Hosts.has_cluster`."""
        return self._placements.allocator is not None

    def list_hosts(self) -> Sequence[HostWithTasks]:
        """See `interfaces.server_services.Hosts.list_hosts`."""
        statuses, task_ids = dict(self._placements.host_statuses()), self._running_task_ids()
        if ":" in self._placements.selected_host.identity.name:  # new tasks run on other hosts
            own_host, own_tasks = statuses.pop(""), task_ids.pop("", [])
            if own_tasks:
                # The cluster's engine may also list this machine, under the same name.
                key = next((key for key, status in statuses.items() if status.name == own_host.name), "")
                statuses.setdefault(key, own_host)
                task_ids[key] = [*task_ids.get(key, []), *own_tasks]
        for key in task_ids.keys() - statuses.keys():
            reason = "This server has no information about the host."
            statuses[key] = HostStatus(key.partition(":")[2], HostState.UNREACHABLE, reason)
        hosts = [HostWithTasks(status, sorted(task_ids.get(key, []))) for key, status in statuses.items()]
        return sorted(hosts, key=lambda host: host.status.name)

    async def drain_host(self, name: str) -> HostWithTasks:
        """See `interfaces.server_services.Hosts.drain_host`."""
        return await self._change_drain(name, self._require_allocator().drain_host)

    async def undo_host_drain(self, name: str) -> HostWithTasks:
        """See `interfaces.server_services.Hosts.undo_host_drain`."""
        return await self._change_drain(name, self._require_allocator().undo_host_drain)

    def _require_allocator(self) -> HostAllocator:
        allocator = self._placements.allocator
        if allocator is None:
            message = "There is no cluster: all tasks run on the server's machine. Drain it with: sandbox admin drain"
            raise HostNotFoundError(message)
        return allocator

    async def _change_drain(self, name: str, change: Callable[[str], Awaitable[None]]) -> HostWithTasks:
        try:
            await change(name)
        except OSError as error:
            raise UnavailableError(f"The drain was not changed: {error_reason(error)}") from error
        hosts = {host.status.name: host for host in self.list_hosts()}
        unlisted = HostStatus(name, HostState.NOT_READY, "The engine has no host with this name.")
        return hosts.get(name) or HostWithTasks(unlisted, ())

    def _running_task_ids(self) -> dict[str, list[str]]:
        """Return the tasks with a running attempt, keyed by the host; the key of the server's own host is empty."""
        task_ids: defaultdict[str, list[str]] = defaultdict(list)
        for tracked in self._tracked_tasks.values():
            task = tracked.task
            if task.attempt is not None and not task.state.is_final and not task.is_between_attempts:
                location = attempt_location(task, task.attempt)
                task_ids[location.host if location.placement else ""].append(task.id)
        return dict(task_ids)


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
    """Return the combined usage of all CPUs since the previous sample; None without one, or if no time was counted."""
    if previous is None or current.cpu_total_ticks <= previous.cpu_total_ticks:
        return None
    busy = current.cpu_busy_ticks - previous.cpu_busy_ticks
    return round(100 * max(busy, 0) / (current.cpu_total_ticks - previous.cpu_total_ticks), 1)


class Administration:
    """Implements `interfaces.server_services.Administration`. retention: the default retention of finished tasks."""

    def __init__(
        self,
        tracked_tasks: TrackedTasks,
        dispatcher: Dispatcher,
        clock: Clock,
        drain: Drain,
        pruner: Pruner,
        retention: Retention,
        health_check: HealthCheck,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._dispatcher = dispatcher
        self._clock = clock
        self._drain = drain
        self._pruner = pruner
        self._retention = retention
        self._health_check = health_check
        self._health_check_lock = asyncio.Lock()
        self._next_health_check: asyncio.Task[Health] | None = None
        """The check that has not started yet. All requests that arrive before its start share it."""

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> PruneResult:
        """See `interfaces.server_services.Administration.prune`."""
        try:
            return await self._pruner.prune(retention or self._retention, dry_run=dry_run)
        except (OSError, TimeoutError) as error:
            reason = error_reason(error)
            raise UnavailableError(f"Finished tasks could not be removed: {reason}; try again.") from error

    async def drain(self) -> DrainStatus:
        """See `interfaces.server_services.Administration.drain`."""
        await asyncio.to_thread(self._drain.start, self._clock.now())
        self._dispatcher.dispatch()
        return await self.drain_status()

    async def undo_drain(self) -> DrainStatus:
        """See `interfaces.server_services.Administration.undo_drain`."""
        await asyncio.to_thread(self._drain.undo)
        self._dispatcher.dispatch()
        return await self.drain_status()

    async def drain_status(self) -> DrainStatus:
        """See `interfaces.server_services.Administration.drain_status`."""
        waiting = self._dispatcher.waiting_count
        unfinished = sum(not tracked.task.state.is_final for tracked in self._tracked_tasks.values())
        return DrainStatus(self._drain.since, max(unfinished - waiting, 0), waiting)

    async def health(self) -> Health:
        """See `interfaces.server_services.Administration.health`."""
        if self._next_health_check is None:
            self._next_health_check = asyncio.create_task(self._check_health())
        health = await asyncio.shield(self._next_health_check)
        return dataclasses.replace(health, occupancy=self._dispatcher.occupancy)

    async def _check_health(self) -> Health:
        """Run one check at a time, in a dedicated thread, because requests may keep the shared threads busy."""
        async with self._health_check_lock:
            self._next_health_check = None
            return await run_in_daemon_thread(self._health_check.run)
