"""Builds and runs the server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname, socket
from typing import Literal

from sandbox import __version__
from sandbox.access_tokens.token_file import TokenFile
from sandbox.agents import registered_agents
from sandbox.api.app import create_app, create_websocket_app
from sandbox.api.app_context import AppContext
from sandbox.api.auth.request_admission import RequestAdmission
from sandbox.api.http.listening_sockets import UnprotectedAddressError, bind, is_externally_reachable, listen
from sandbox.api.http.server import serve
from sandbox.api.settings import ApiSettings
from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.data_dir_lock import lock_data_dir
from sandbox.bootstrap.local_host import AgentsAndCommands, PlacementContext, create_local_placement
from sandbox.bootstrap.log import configure_logging
from sandbox.bootstrap.private_directory import make_data_dir
from sandbox.bootstrap.run_directory import choose_run_dir
from sandbox.bootstrap.server_objects import TaskServer
from sandbox.bootstrap.settings.registered_placements import ChosenPlacements, choose_placements
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.dashboard.routing import add_dashboard
from sandbox.disks.free_space import measure_disk_space
from sandbox.disks.reserve_file import ReserveFile
from sandbox.images.profile_catalog import make_profile_problem_lister
from sandbox.interfaces.agent import Agent
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.fixed_limits import SERVER_RESERVE_BYTES
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.placement_routing import Placements
from sandbox.server.runtime_probing import ProbedHost

AnnounceFormat = Literal["text", "json"]
_log = logging.getLogger(__name__)

DESCRIPTORS_MAX = 65_536
"""The server's limit on open files, unless the host's limit is lower. At the limit, new tasks are rejected with 503."""


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
            _log.warning("Stopped during the first probe of the runtimes.")
            return
        host = placements.selected_host
        list_profile_problems = make_profile_problem_lister(host.images.list_minimum_tiers, lambda: host.result.tier)
        api_settings = _api_settings(
            settings,
            [*sockets, *websocket_sockets],
            needs_token=needs_token,
            agents=agents,
            list_profile_problems=list_profile_problems,
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
    list_profile_problems: Callable[[], Mapping[str, str]],
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
        list_profile_problems=list_profile_problems,
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
