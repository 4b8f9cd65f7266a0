"""Reports whether the server can accept and run tasks."""

from collections.abc import Mapping

from sandbox import __version__
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.server_services import Health
from sandbox.interfaces.store import Store, StoreError
from sandbox.model.task_state import TaskState
from sandbox.server.drain import Drain
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.runtime_probing import ProbedHost
from sandbox.server.start_conditions import StartConditions


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
