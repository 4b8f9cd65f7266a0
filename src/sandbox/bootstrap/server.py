"""Builds and runs the server: selects its placements, constructs its objects, binds its sockets.

Each object receives its dependencies in its constructor.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import gethostname, socket
from typing import Literal, NamedTuple

from sandbox import __version__
from sandbox.access_tokens.token_file import TokenFile
from sandbox.agents import registered_agents
from sandbox.api.app import create_app, create_websocket_app
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import RequestAdmission
from sandbox.api.http.server import UnprotectedAddressError, bind, is_externally_reachable, listen, serve
from sandbox.api.settings import ApiSettings
from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.local_host import (
    AgentsAndCommands,
    PlacementContext,
    create_local_placement,
    make_leftover_sources,
    measure_host_load,
)
from sandbox.bootstrap.log import configure_logging
from sandbox.bootstrap.private_directories import choose_run_dir, lock_data_dir, make_data_dir
from sandbox.bootstrap.secret_sources import ServerSecretResolver, upstream_from_environment
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.dashboard.routing import add_dashboard
from sandbox.disks.commands import remove_trees
from sandbox.disks.reserve_file import ReserveFile, measure_disk_space
from sandbox.images.profiles import ProfileCatalog, make_profile_lister
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.auth import TokenStore
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import Placement
from sandbox.interfaces.server_services import TaskServices
from sandbox.interfaces.store import Store
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.events import ConversationEvent
from sandbox.model.fixed_limits import SERVER_RESERVE_BYTES, UNFINISHED_TASKS_MAX
from sandbox.model.manifest.schema import Manifest
from sandbox.placements.local.attempt_files import ProbeCleanup
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.server.administration import Administration, HealthCheck, Hosts, LoadHistory
from sandbox.server.derived_tasks import DerivedTaskPlanner
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.event_streams import Broadcast, EventStream
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.maintenance import (
    Janitor,
    JournalCompressor,
    LeftoverRemover,
    MaintenanceAction,
    WallClockCheck,
    discard_unrecorded_tasks,
)
from sandbox.server.placements import Placements, ProbedHost
from sandbox.server.preserved_sandboxes import DebugSessions, PreservationExpiry, PreservedSandboxes
from sandbox.server.pruning import Pruner
from sandbox.server.recovery import RunnerRecovery, recover
from sandbox.server.runner_launcher import RunnerLauncher, TaskSecrets
from sandbox.server.scheduler import Scheduler
from sandbox.server.start_conditions import DiskMonitor, Drain, StartConditions, UnfinishedTaskLimit
from sandbox.server.submissions import Submissions, SubmissionStore, TaskTracker
from sandbox.server.task_services import (
    Canceller,
    TaskArtifacts,
    TaskCancellation,
    TaskDeletion,
    TaskQueries,
    TaskSandboxes,
)
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
        preserved, queries = PreservedSandboxes(placements), TaskQueries(tracked_tasks, store, placements)
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
    running_tasks = "running tasks continue, and the next server on this data directory follows them"
    _log.warning("Stopped. %s the server; %s.", tasks, running_tasks)


CreatePlacement = Callable[[PlacementContext], Awaitable[Placement]]
"""Creates a placement for a server. Raises OSError, SandboxError."""


class RegisteredPlacement(NamedTuple):
    """A placement that a server can use in addition to the one for its own host.

    is_selected: returns whether the settings select the placement for new attempts.
    load: imports the placement, and returns the function that creates it. A server loads only what the settings select.
    """

    is_selected: Callable[[ServerSettings], bool]
    load: Callable[[], CreatePlacement]


class ChosenPlacements(NamedTuple):
    """All placements of a server except the one for its own host, keyed by the prefix of their host names.

    selected: the name of the placement that runs new attempts; empty for the server's own host.
    """

    by_name: Mapping[str, CreatePlacement] = {}
    selected: str = ""


def _load_cluster() -> CreatePlacement:
    from sandbox.bootstrap.cluster_placement import create_placement

    return create_placement


REGISTERED_PLACEMENTS: Mapping[str, RegisteredPlacement] = {
    "cluster": RegisteredPlacement(lambda settings: settings.cluster.engine != "none", _load_cluster),
}
"""The placements, keyed by the prefix of their host names."""


def choose_placements(
    settings: ServerSettings, registered: Mapping[str, RegisteredPlacement] = REGISTERED_PLACEMENTS
) -> ChosenPlacements:
    """Load the placement that the settings select, if any. Raises ConfigurationError if they select several."""
    names = [name for name, each in registered.items() if each.is_selected(settings)]
    if len(names) > 1:
        raise ConfigurationError(f"Only one of these can run new tasks, but all are configured: {', '.join(names)}.")
    return ChosenPlacements({name: registered[name].load() for name in names}, "".join(names))


AnnounceFormat = Literal["text", "json"]

DESCRIPTORS_MAX = 65_536
"""The server raises its limit on open files to this number, or to the hard limit if that is lower.

A limit that is higher already is kept. The limit also bounds the number of unfinished tasks; further ones get 503.
"""

_THREADS_MAX = 64
"""Maximum number of threads that read and write files. Each token uses at most CONCURRENT_THREADS_MAX at a time.

asyncio's default is four more than there are processors, so three tokens could occupy all of them.
"""


def run(
    settings: ServerSettings,
    *,
    announce: AnnounceFormat = "text",
    agents_and_commands: AgentsAndCommands | None = None,
    placements: ChosenPlacements | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises SandboxError or OSError if the server cannot start.

    announce: whether the addresses are printed as text or as one JSON line once the server is ready.
    agents_and_commands: None for Sandbox's own agents.
    placements: None for those that the settings select.
    """
    os.umask(0o077)
    configure_logging(settings.log.format, settings.log.level)
    _raise_descriptor_limit()
    data_dir = make_data_dir(settings.server.data_dir.absolute())
    with lock_data_dir(data_dir):
        agents_and_commands = agents_and_commands or AgentsAndCommands(registered_agents())
        context = PlacementContext(
            data_dir, choose_run_dir(data_dir), settings, agents_and_commands, FileTaskReplicas(data_dir)
        )
        asyncio.run(_serve(context, placements or choose_placements(settings), announce))


async def _serve(placement_context: PlacementContext, chosen: ChosenPlacements, announce: AnnounceFormat) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS_MAX, "worker"))
    settings, data_dir, agents = placement_context.settings, placement_context.data_dir, placement_context.agents
    section, token_store = settings.server, TokenFile(data_dir)
    sockets = bind(section.host, section.port)
    websocket_sockets = bind(section.host, section.ws_port, "ws_port")
    needs_token = is_externally_reachable([*sockets, *websocket_sockets])
    if needs_token and not token_store.list_valid():
        raise UnprotectedAddressError(section.host)
    port, websocket_port = (bound[0].getsockname()[1] for bound in (sockets, websocket_sockets))
    shutting_down = asyncio.Event()
    with set_on_signals(shutting_down):
        disk_monitor = _make_disk_monitor(settings, data_dir)
        placements = await run_until_first_complete(
            _create_placements(placement_context, chosen), _wait_until_set(shutting_down)
        )
        if placements is None:
            _log.warning("The server was stopped before it was ready.")
            return
        host = placements.selected_host
        list_profiles = make_profile_lister(host.images.list_minimum_tiers, lambda: host.result.tier)
        api_settings = _api_settings(
            settings,
            [*sockets, *websocket_sockets],
            needs_token=needs_token,
            agents=agents,
            list_profiles=list_profiles,
        )
        server = TaskServer(placement_context, placements, token_store, disk_monitor)
        async with server.running():
            admission = RequestAdmission(token_store, api_settings)
            context = AppContext.create(server.services, api_settings, shutting_down, admission)
            app = create_app(context)
            add_dashboard(app, context)
            listen(sockets)
            listen(websocket_sockets, "ws_port")
            await serve(
                app,
                create_websocket_app(context),
                sockets,
                websocket_sockets,
                shutting_down=shutting_down,
                on_started=lambda: _announce(
                    section.host,
                    data_dir,
                    (port, websocket_port),
                    announce,
                    list(server.start_conditions.rejection_reasons()),
                ),
            )


@contextmanager
def set_on_signals(event: asyncio.Event) -> Iterator[None]:
    """Set the event on SIGTERM and SIGINT. Requires a running event loop."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, event.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _create_placements(context: PlacementContext, chosen: ChosenPlacements) -> Placements:
    """Create the placements and probe their hosts for the first time."""
    creators = {"": create_local_placement, **chosen.by_name}
    by_name = {name: await create(context) for name, create in creators.items()}
    hosts = {
        name: ProbedHost(await placement.host.probe(), placement.host, SystemClock())
        for name, placement in by_name.items()
    }
    return Placements(by_name, hosts, chosen.selected)


def _api_settings(
    settings: ServerSettings,
    sockets: Sequence[socket],
    *,
    needs_token: bool,
    agents: Mapping[str, Agent],
    list_profiles: Callable[[], Mapping[str, str]],
) -> ApiSettings:
    addresses, ports = zip(*(one.getsockname()[:2] for one in sockets), strict=True)
    own_names: set[str] = set() if needs_token else {*addresses}
    # Accept no name except the machine's own: a different name that resolves to loopback may belong to another site.
    if own_names and settings.server.host.lower() == gethostname().lower():
        own_names.add(settings.server.host)
    return ApiSettings(
        version=__version__,
        ports=frozenset(ports),
        host_names=frozenset((*settings.server.host_names, *own_names)),
        requires_token=needs_token,
        requests_per_minute=settings.access.requests_per_minute,
        clone_hosts=frozenset(settings.git.allowed_hosts),
        agents=agents,
        list_profiles=list_profiles,
        overcommit=dataclasses.asdict(settings.capacity) if settings.cluster.engine == "none" else {},
    )


async def _wait_until_set(event: asyncio.Event) -> None:
    await event.wait()


def _make_disk_monitor(settings: ServerSettings, data_dir: Path) -> DiskMonitor:
    """Create the monitor, and check the disk before any file is opened. If the disk is full, release the reserve."""
    reserve = ReserveFile(data_dir / "reserve", SERVER_RESERVE_BYTES)
    disk_monitor = DiskMonitor(data_dir, lambda: measure_disk_space(data_dir), settings.disk.new_tasks, reserve)
    disk_monitor.check()
    return disk_monitor


def _announce(
    listen_host: str,
    data_dir: Path,
    ports: tuple[int, int],
    announce: AnnounceFormat,
    rejection_reasons: Sequence[str],
) -> None:
    host = f"[{listen_host}]" if ":" in listen_host else listen_host
    http, ws = f"http://{host}:{ports[0]}", f"ws://{host}:{ports[1]}"
    if announce == "json":
        print(json.dumps({"http": http, "ws": ws, "pid": os.getpid(), "data_dir": str(data_dir)}), flush=True)
    else:
        _print_text(f"Sandbox is listening at {http}\n  WebSocket: {ws}\n  Data:      {data_dir}")
    _log.info("The server is listening", extra={"http": http, "ws": ws, "pid": os.getpid(), "data_dir": data_dir})
    for reason in rejection_reasons:
        _log.warning("The server does not accept tasks. %s", reason)


def _print_text(text: str) -> None:
    """Print text for users. A full disk under a log file must not stop the server."""
    try:
        print(text, flush=True)
    except OSError as error:
        _log.warning("The addresses could not be printed: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter reports the error again at exit


def _raise_descriptor_limit() -> None:
    """Raise the limit on open files, which is 1024 by default.

    A waiting task needs two descriptors; a streaming client needs one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        target = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))
