"""Drains the server, prunes its finished tasks and shares its health checks."""

import asyncio
import dataclasses

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.server_services import DrainStatus, Health, PruneResult, Retention, UnavailableError
from sandbox.model.errors import error_reason
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.administration.health import HealthCheck
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.drain import Drain
from sandbox.server.maintenance.pruning import Pruner
from sandbox.server.tracked_task import TrackedTasks


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
