"""Constructs the objects of a server and runs them. Each object receives its dependencies in its constructor."""

import asyncio
import logging
import os
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.local_host import PlacementContext, make_leftover_sources
from sandbox.bootstrap.model_upstream import upstream_from_environment
from sandbox.bootstrap.secret_sources import ServerSecretResolver
from sandbox.disks.tree_removal import remove_trees
from sandbox.images.profile_catalog import ProfileCatalog
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.auth import TokenStore
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.server_services import TaskServices
from sandbox.interfaces.store import Store
from sandbox.journal.journals import FileJournals
from sandbox.model.events import ConversationEvent
from sandbox.model.fixed_limits import UNFINISHED_TASKS_MAX
from sandbox.model.manifest.schema import Manifest
from sandbox.placements.local.host_load import measure_host_load
from sandbox.placements.local.probe_leftovers import ProbeCleanup
from sandbox.server.administration.drain_and_prune import Administration
from sandbox.server.administration.health import HealthCheck
from sandbox.server.administration.hosts import Hosts
from sandbox.server.administration.load_history import LoadHistory
from sandbox.server.cancellation import Canceller
from sandbox.server.debug_sessions import DebugSessions
from sandbox.server.derived_tasks import DerivedTaskPlanner
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.drain import Drain
from sandbox.server.event_stream import Broadcast, EventStream
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.maintenance.compression import JournalCompressor
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.maintenance.janitor import Janitor, MaintenanceAction
from sandbox.server.maintenance.leftover_removal import LeftoverRemover
from sandbox.server.maintenance.pruning import Pruner
from sandbox.server.maintenance.wall_clock_check import WallClockCheck
from sandbox.server.placement_routing import Placements
from sandbox.server.preserved_sandboxes import PreservationExpiry, PreservedSandboxes
from sandbox.server.recovery.dead_runner_recovery import RunnerRecovery
from sandbox.server.recovery.startup_recovery import discard_unrecorded_tasks, recover
from sandbox.server.runner_launcher import RunnerLauncher
from sandbox.server.scheduler import Scheduler
from sandbox.server.start_conditions import StartConditions, UnfinishedTaskLimit
from sandbox.server.submissions import Submissions, SubmissionStore, TaskTracker
from sandbox.server.task_secrets import TaskSecrets
from sandbox.server.task_services import TaskArtifacts, TaskCancellation, TaskDeletion, TaskQueries, TaskSandboxes
from sandbox.server.tracked_task import TrackedTask
from sandbox.store.sqlite import SqliteStore

_log = logging.getLogger(__name__)

_DESCRIPTORS_PER_TASK = 4
"""Number of the server's file descriptors for each unfinished task that it accepts; a waiting task uses two."""


class TaskServer:
    """A server without its API: the services that it offers, and the background work in `running`."""

    def __init__(
        self,
        context: PlacementContext,
        placements: Placements,
        token_store: TokenStore,
        disk_monitor: DiskMonitor,
    ) -> None:
        """Construct the objects; background work starts only in `running`. Raises StoreError, OSError."""
        data_dir, settings, agents, clock = context.data_dir, context.settings, context.agents, SystemClock()
        tracked_tasks, host = dict[str, TrackedTask](), placements.selected_host
        journals, store, drain = FileJournals(data_dir), SqliteStore(data_dir / "index.sqlite"), Drain(data_dir)
        upstreams = {kind: upstream_from_environment(agent, os.environ) for kind, agent in agents.items()}
        secrets = TaskSecrets(ServerSecretResolver(settings.secrets, os.environ, token_store, agents.values()).resolve)
        # `may_follow_redirects` is called at each launch, because tokens may be created while the server runs.
        launcher = RunnerLauncher(placements, secrets, upstreams, lambda: not token_store.has_tokens)
        api_key_variables = {kind: agent.api_key_variable for kind, agent in agents.items()}
        kinds_without_key = {kind for kind, upstream in upstreams.items() if upstream is None}
        conditions = StartConditions(drain, host, disk_monitor, api_key_variables, kinds_without_key)
        allocator, limit = placements.allocator, UnfinishedTaskLimit(unfinished_tasks_max())
        scheduler = Scheduler(host.capacity, None if allocator is None else allocator.maximal_host_sizes)
        dispatcher = Dispatcher(tracked_tasks, scheduler, launcher, conditions, host, limit)
        broadcast, recovery = Broadcast(), RunnerRecovery(journals, placements, launcher, secrets, conditions, clock)
        index_writer, submission_store = IndexWriter(store), SubmissionStore(data_dir, journals, store, clock)
        tailer = JournalTailer(tracked_tasks, journals, index_writer, clock, broadcast, dispatcher, recovery)
        tracker = TaskTracker(tracked_tasks, dispatcher, tailer)
        health_check = HealthCheck(store, clock, conditions, disk_monitor, drain, host)
        preserved, queries = PreservedSandboxes(placements), TaskQueries(tracked_tasks, store, placements, clock)
        pruner = Pruner(data_dir, journals, store, preserved, clock, remove_trees)
        events = EventStream(tracked_tasks, journals, store, broadcast, partial(_convert_line, agents))
        load = LoadHistory(tracked_tasks, dispatcher, disk_monitor, clock, measure_host_load)
        self.services = TaskServices(
            Submissions(submission_store, queries, tracker, dispatcher, conditions, index_writer),
            queries,
            TaskCancellation(tracked_tasks, queries, Canceller(journals, clock), clock),
            TaskDeletion(tracked_tasks, queries, preserved, pruner),
            events,
            TaskArtifacts(data_dir, queries),
            TaskSandboxes(tracked_tasks, queries, preserved, DebugSessions(preserved, secrets, placements)),
            Administration(tracked_tasks, dispatcher, clock, drain, pruner, settings.retention.retention, health_check),
            DerivedTaskPlanner(data_dir, queries, events),
            load,
            Hosts(tracked_tasks, placements),
        )
        self.start_conditions = conditions
        self._tracker, self._store, self._pruner = tracker, store, pruner
        self._recover = partial(_recover, data_dir, journals, store, placements, clock)
        actions = create_maintenance_actions(context, placements, journals, store, clock, preserved, pruner)
        self._janitor = Janitor(actions)
        self._disk_monitor, self._placements, self._load = disk_monitor, placements, load

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Continue the unfinished tasks and run the background loops while the context is active."""
        self._pruner.prepare()
        self._tracker.track(*await asyncio.to_thread(self._recover))
        tasks = [
            asyncio.create_task(self._janitor.run(), name="janitor"),
            asyncio.create_task(self._disk_monitor.run(self._tracker.dispatch), name="space"),
            asyncio.create_task(self._load.run(), name="load"),
            *(asyncio.create_task(host.run(), name="prober") for host in self._placements.hosts),
            *(asyncio.create_task(placement.run(), name="placement") for placement in self._placements),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._tracker.close()
            await asyncio.to_thread(self._store.close)
            _log_shutdown(len(self._tracker.tracked_tasks))


def unfinished_tasks_max() -> int:
    """Return how many unfinished tasks this process can track, given its limit on file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        UNFINISHED_TASKS_MAX
        if soft == resource.RLIM_INFINITY
        else min(UNFINISHED_TASKS_MAX, soft // _DESCRIPTORS_PER_TASK)
    )


def _convert_line(agents: Mapping[str, Agent], manifest: Manifest, line: bytes) -> Sequence[ConversationEvent] | None:
    """Convert a recorded line, using the task's agent. Implements `ConvertLine`."""
    agent = agents.get(manifest.agent.kind)
    return None if agent is None else agent.convert_recorded_line(manifest, line)


def _recover(
    data_dir: Path, journals: Journals, store: Store, placements: Placements, clock: Clock
) -> list[TrackedTask]:
    """Remove the files of tasks that a dead server had not yet accepted; return the unfinished tasks."""
    discard_unrecorded_tasks(data_dir, journals, store)
    return recover(journals, store, placements, clock)


def create_maintenance_actions(
    context: PlacementContext,
    placements: Placements,
    journals: Journals,
    store: Store,
    clock: Clock,
    preserved: PreservedSandboxes,
    pruner: Pruner,
) -> Sequence[MaintenanceAction]:
    """Create the janitor's actions in execution order."""
    data_dir, run_dir, settings = context.data_dir, context.run_dir, context.settings
    time_to_live_seconds = settings.preserve.time_to_live_seconds
    wall_clock_check = WallClockCheck(clock)
    expiry = PreservationExpiry(store, preserved, clock, time_to_live_seconds)
    all_files = [placement.files for placement in placements]
    leftover_remover = LeftoverRemover(journals, store, preserved, all_files)
    probes = ProbeCleanup(run_dir, make_leftover_sources(data_dir, run_dir), remove_trees)
    compressor = JournalCompressor(journals, store, clock)

    async def expire() -> None:
        if wall_clock_check.is_trusted(time_to_live_seconds):
            await expiry.sweep()

    async def prune() -> None:
        bounds = settings.retention.retention
        if not wall_clock_check.is_trusted(bounds.older_than_seconds or 0):
            bounds = replace(bounds, older_than_seconds=None)
        await pruner.prune(bounds)

    async def remove_stale_builds() -> None:
        await asyncio.to_thread(ProfileCatalog(data_dir).remove_stale_builds)

    return (
        MaintenanceAction("preserved sandboxes", expire, "Check the index and the disk of the data directory."),
        MaintenanceAction(
            "leftovers of crashed attempts",
            leftover_remover.sweep,
            "Fix the cause, and do not delete the files while the server is running.",
        ),
        MaintenanceAction(
            "journals of finished tasks", compressor.sweep, "Free up space on the disk of the data directory."
        ),
        MaintenanceAction("expired tasks", prune, "Check [retention] and the disk of the data directory."),
        MaintenanceAction("leftovers of probes", probes.sweep, f"Check {run_dir}."),
        MaintenanceAction("incomplete images", remove_stale_builds, f"Check {data_dir / 'profiles'}."),
    )


def _log_shutdown(count: int) -> None:
    """Warn that running tasks continue (and keep costing money) after the server stops."""
    if not count:
        _log.info("Stopped. There are no unfinished tasks.")
        return
    tasks = "1 unfinished task outlives" if count == 1 else f"{count} unfinished tasks outlive"
    running_tasks = "running tasks continue, and the next server on this data directory takes over"
    _log.warning("Stopped. %s the server; %s.", tasks, running_tasks)
