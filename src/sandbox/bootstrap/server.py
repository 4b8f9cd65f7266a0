"""Wires the server: every room, once, and what they are told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from socket import gethostname, socket
from typing import Any, Literal, TypeVar

import msgspec

from sandbox import __version__
from sandbox.agents.claude_code.binary import install_binary
from sandbox.api.app import create_app, create_stream_app
from sandbox.api.auth.authenticator import Guard
from sandbox.api.http.server import OpenAddressError, bind, is_open, listen, serve, set_by_signals
from sandbox.api.settings import ApiSettings
from sandbox.auth.token_file import TokenFile
from sandbox.bootstrap.data_dir_lock import held
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE, begin_log
from sandbox.bootstrap.machine import (
    SystemClock,
    choose_run_dir,
    measure_capacity,
    name_host,
    read_boot_id,
    read_memory_available_bytes,
)
from sandbox.bootstrap.maintenance import gather_duties
from sandbox.bootstrap.private_directory import make_data_dir
from sandbox.bootstrap.runtime import AUTO, Choice, choose_runtime, explain_failure, make_runtime, tell_offered
from sandbox.bootstrap.secrets import ServerSecrets, read_upstream
from sandbox.bootstrap.settings.schema import LogSection, ServerSettings
from sandbox.dashboard.routes import add_dashboard
from sandbox.disks.loop import why_no_loop
from sandbox.disks.removal import remove
from sandbox.disks.space import ReserveFile, measure_space
from sandbox.gateway.model.pricing import is_priced
from sandbox.images.catalog import Catalog
from sandbox.interfaces.auth import Access
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.layout import TaskLayout
from sandbox.interfaces.placement import LaunchOrder, Placement
from sandbox.journal.journals import FileJournals
from sandbox.model.limits import SERVER_RESERVE_BYTES
from sandbox.placements.local.placement import LocalPlacement
from sandbox.placements.local.runner_client import UnixRunnerControl
from sandbox.runtimes.probe import MachineBusyError, why_not_confined
from sandbox.server.artifact_store import Shelf
from sandbox.server.broadcast import Broadcast
from sandbox.server.drain import Drain
from sandbox.server.event_stream import Telling
from sandbox.server.health import HealthReport
from sandbox.server.journal_tailer import Follower
from sandbox.server.launcher import Host, Launcher
from sandbox.server.maintenance.disk_monitor import SpaceKeeper
from sandbox.server.maintenance.janitor import Janitor
from sandbox.server.maintenance.probe_cleanup import probing_in_background
from sandbox.server.maintenance.pruning import Pruning, PruningRooms
from sandbox.server.preserved_sandboxes import Preservation, Visits
from sandbox.server.recovery import recover
from sandbox.server.runtime_prober import ProbeResult, RuntimeProber
from sandbox.server.scheduler import WaitingRoom
from sandbox.server.submissions import Register
from sandbox.server.task_service import Equipment, TaskService
from sandbox.store.sqlite import SqliteStore
from sandbox.system.files import flush


async def find_confining(choice: Choice, run_dir: Path) -> bool:
    """Where something is missing for it, which 'sandbox doctor' tells too, git has the server's rights.

    Where the machine is only busy it is confined: an attempt whose confinement then fails ends, and no other does.
    It is tried also where no sandbox can be made: a finisher of an earlier attempt reads its workspace all the same.
    """
    try:
        reason = await why_not_confined(make_runtime(choice.chosen.runtime, run_dir), run_dir)
    except MachineBusyError as busy:
        _log.warning("git runs confined, though trying that failed twice: %s", busy)
        return True
    if reason is not None:
        _log.warning("git runs with the server's rights, since it cannot be confined: %s", reason)
    return reason is None


@dataclass(frozen=True, slots=True)
class GuardedPlacement:
    """Looks whether there are tokens each time a runner starts: they may come while the server runs."""

    placement: Placement
    access: Access

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """See `Placement.launch`."""
        told = msgspec.structs.replace(order, follow_redirects=not self.access.has_tokens)
        await self.placement.launch(told, lock_fd)


Announce = Literal["text", "json"]
Result = TypeVar("Result")
_log = logging.getLogger(__name__)

DESCRIPTORS_MAX = 65_536
"""Open files of the server, where the machine allows so many; past it tasks are refused with 503."""

RUNNER_COMMAND = (sys.executable, "-I", "-m", "sandbox.bootstrap.runner")
_RUNNER_VARIABLES = (
    "HOME", "LANG", "LOGNAME", "PATH", "USER", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
    "GIT_CONFIG_GLOBAL", "SSH_AUTH_SOCK", "SSL_CERT_DIR", "SSL_CERT_FILE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of one server."""

    data_dir: Path
    run_dir: Path


def run(settings: ServerSettings, *, announce: Announce = "text") -> None:
    """Serve until SIGTERM or SIGINT. Raises SandboxError or OSError when the server cannot start.

    announce: how the addresses are printed once the server answers: for people, or as one JSON line.
    """
    os.umask(0o077)
    begin_log(settings.log.format, settings.log.level)
    _allow_descriptors()
    data_dir = make_data_dir(settings.server.data_dir.absolute())
    with held(data_dir):
        asyncio.run(_serve(settings, Places(data_dir, choose_run_dir(data_dir)), announce))


async def _serve(settings: ServerSettings, places: Places, announce: Announce) -> None:
    where, access = settings.server, TokenFile(places.data_dir)
    sockets = bind(where.host, where.port)
    stream_sockets = bind(where.host, where.ws_port, "ws_port")
    needs_token = is_open([*sockets, *stream_sockets])
    if needs_token and not access.good():
        raise OpenAddressError(where.host)
    port, stream_port = (bound[0].getsockname()[1] for bound in (sockets, stream_sockets))
    api_settings = _api_settings(settings, [*sockets, *stream_sockets], needs_token=needs_token)
    guard = Guard(access, api_settings)
    shutting_down = asyncio.Event()
    with set_by_signals(shutting_down):
        space = _keep_space(settings, places)
        prober = await _unless(shutting_down, _make_prober(settings, places))
        if prober is None:
            _log.warning("Stopped during the first probe of the runtimes.")
            return
        service = await _start_service(settings, places, access, prober, space)
        offered = tell_offered(Catalog(places.data_dir), lambda: prober.result.tier)
        api_settings = replace(api_settings, profiles=offered)
        async with _running(settings, places, service):
            app = create_app(service, settings=api_settings, shutting_down=shutting_down, guard=guard)
            add_dashboard(app)
            listen(sockets)
            listen(stream_sockets, "ws_port")
            await serve(
                app,
                create_stream_app(app),
                sockets,
                stream_sockets,
                shutting_down=shutting_down,
                on_started=lambda: _announce(
                    where.host, places, (port, stream_port), announce, service.equipment.health.blockers
                ),
            )


def _api_settings(settings: ServerSettings, bound: Sequence[socket], *, needs_token: bool) -> ApiSettings:
    addresses, ports = zip(*(one.getsockname()[:2] for one in bound), strict=True)
    own_names: set[str] = set() if needs_token else {*addresses}
    # Any other name of a loopback address may belong to another site.
    if own_names and settings.server.host.lower() == gethostname().lower():
        own_names.add(settings.server.host)
    return ApiSettings(
        version=__version__,
        ports=frozenset(ports),
        host_names=frozenset((*settings.server.host_names, *own_names)),
        needs_token=needs_token,
        requests_per_minute=settings.access.requests_per_minute,
        clone_hosts=frozenset(settings.git.allowed_hosts),
        priced=is_priced,
    )


@asynccontextmanager
async def _running(settings: ServerSettings, places: Places, service: TaskService) -> AsyncIterator[None]:
    """Run the background jobs; close the service at the end."""
    duties = gather_duties(places.data_dir, places.run_dir, service.equipment, settings)
    helpers = [
        asyncio.create_task(Janitor(duties).run(), name="janitor"),
        asyncio.create_task(service.equipment.space.run(), name="space"),
        asyncio.create_task(service.equipment.prober.run(), name="prober"),
    ]
    try:
        yield
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        await service.close()
        _tell_end(len(service.equipment.follower.feeds))


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None if the event is set first, which cancels it and waits until it has cleaned up."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
            return None
        return working.result()
    finally:
        waiting.cancel()


async def _make_prober(settings: ServerSettings, places: Places) -> RuntimeProber:
    agent_program = await asyncio.to_thread(install_binary, places.data_dir)
    probe = partial(_probe, settings, places, agent_program)
    return RuntimeProber(await probe(), probe, SystemClock())


async def _probe(settings: ServerSettings, places: Places, agent_program: Path) -> ProbeResult:
    async with probing_in_background(places.run_dir):
        choice = await choose_runtime(settings.server.runtime, places.run_dir)
        no_loop = await why_no_loop(places.run_dir)
        confines = await find_confining(choice, places.run_dir)
    template = LaunchOrder(
        task_id="",
        attempt_id="",
        data_dir=str(places.data_dir),
        run_dir=str(places.run_dir),
        runtime=choice.chosen.runtime,
        auto=settings.server.runtime == AUTO,
        agent_program=str(agent_program),
        upstream=read_upstream(os.environ),
        disks="plain" if no_loop else "loop",
        confines=confines,
        output_watermark=settings.disk.output,
    )
    is_final = all(probe.is_final for probe in choice.probes)
    return ProbeResult(choice.probes, template, choice.tier, explain_failure(choice), is_final)


async def _start_service(
    settings: ServerSettings, places: Places, access: Access, prober: RuntimeProber, space: SpaceKeeper
) -> TaskService:
    placement = GuardedPlacement(_placement(places, settings.log), access)
    secrets = ServerSecrets(settings.secrets, os.environ, access)
    service = _wire_service(places, prober, placement, secrets, space, settings)
    rooms = service.equipment
    rooms.pruning.make_ready()
    service.take_in(*await asyncio.to_thread(recover, rooms.journals, rooms.store, rooms.clock))
    return service


def _wire_service(
    places: Places,
    prober: RuntimeProber,
    placement: Placement,
    secrets: ServerSecrets,
    space: SpaceKeeper,
    settings: ServerSettings,
) -> TaskService:
    clock, drain = SystemClock(), Drain(places.data_dir)
    journals = FileJournals(places.data_dir)
    store = SqliteStore(places.data_dir / "index.sqlite")
    broadcast = Broadcast()
    follower = Follower(journals, store, clock, broadcast)
    runners, preservation = UnixRunnerControl(places.run_dir), Preservation(places.data_dir, remove)
    find_image = _image_finder(places, prober)
    host = Host(name_host(), read_boot_id())
    launcher = Launcher(journals, placement, clock, secrets.resolve, find_image, prober=prober, host=host)
    return TaskService(
        Equipment(
            journals=journals,
            store=store,
            register=Register(journals, store, clock),
            clock=clock,
            runners=runners,
            room=WaitingRoom(measure_capacity(places.data_dir, settings.capacity)),
            follower=follower,
            prober=prober,
            launcher=launcher,
            telling=Telling(journals, store, follower, broadcast),
            shelf=Shelf(places.data_dir),
            health=HealthReport(store, clock, space, drain, prober, _blockers(prober.result.template.upstream)),
            space=space,
            drain=drain,
            preservation=preservation,
            pruning=Pruning(PruningRooms(places.data_dir, journals, store, preservation, clock, remove, flush)),
            retention=settings.retention.bounds,
            visits=Visits(placement, runners, preservation, secrets.resolve, find_image, prober),
            read_memory_available_bytes=read_memory_available_bytes,
        )
    )


def _keep_space(settings: ServerSettings, places: Places) -> SpaceKeeper:
    """Looked at once before anything is opened: a full disk gives what the server needs to start out of the reserve."""
    reserve = ReserveFile(places.data_dir / "reserve", SERVER_RESERVE_BYTES)
    keeper = SpaceKeeper(places.data_dir, lambda: measure_space(places.data_dir), settings.disk.new_tasks, reserve)
    keeper.look()
    return keeper


def _image_finder(places: Places, prober: RuntimeProber) -> Callable[[str], Image | None]:
    return lambda profile: Catalog(places.data_dir).find_image(profile, prober.result.tier)


def _blockers(upstream: ModelUpstream | None) -> list[str]:
    """What keeps every task from running for as long as this server lives."""
    if upstream is not None:
        return []
    return ["There is no key for the model: set ANTHROPIC_API_KEY and start the server again."]


def _placement(places: Places, log: LogSection) -> LocalPlacement:
    environment = {name: os.environ[name] for name in _RUNNER_VARIABLES if name in os.environ}
    environment |= {FORMAT_VARIABLE: log.format, LEVEL_VARIABLE: log.level}

    def log_path(order: LaunchOrder) -> Path:
        path = TaskLayout(places.data_dir, order.task_id).attempt(order.attempt_id).runner_log
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    return LocalPlacement(RUNNER_COMMAND, environment, log_path)


def _announce(
    listening: str, places: Places, ports: tuple[int, int], announce: Announce, blockers: Sequence[str]
) -> None:
    host = f"[{listening}]" if ":" in listening else listening
    http, ws = f"http://{host}:{ports[0]}", f"ws://{host}:{ports[1]}"
    if announce == "json":
        print(json.dumps({"http": http, "ws": ws, "pid": os.getpid(), "data_dir": str(places.data_dir)}), flush=True)
    else:
        print(f"Sandbox answers at {http}\n  WebSocket: {ws}\n  Data:      {places.data_dir}", flush=True)
    _log.info("The server answers", extra={"http": http, "ws": ws, "pid": os.getpid(), "data_dir": places.data_dir})
    for reason in blockers:
        _log.warning("It takes no tasks. %s", reason)


def _tell_end(count: int) -> None:
    """Whoever stops a server may take its unfinished tasks for stopped, and they cost money."""
    if not count:
        _log.info("Stopped. No task is unfinished.")
        return
    tasks = "1 unfinished task outlives" if count == 1 else f"{count} unfinished tasks outlive"
    goes_on = "what runs goes on, and the next server on this data directory takes over"
    _log.warning("Stopped. %s the server; %s.", tasks, goes_on)


def _allow_descriptors() -> None:
    """A waiting task costs two descriptors, a follower one: more than the 1024 that most sessions begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
