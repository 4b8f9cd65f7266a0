"""Wires the server: every room, once, and what they are told."""

import asyncio
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox import __version__
from sandbox.agent.binary import install_binary
from sandbox.api.addresses import bind, check_loopback
from sandbox.api.app import create_app, create_stream_app
from sandbox.api.context import ApiSettings
from sandbox.api.serve import serve, set_by_signals
from sandbox.contracts.gateway import ModelUpstream
from sandbox.contracts.layout import TaskLayout
from sandbox.contracts.placement import LaunchOrder
from sandbox.contracts.runtime import Probe
from sandbox.control.admission import WaitingRoom
from sandbox.control.broadcast import Broadcast
from sandbox.control.follower import Follower
from sandbox.control.health import HealthReport
from sandbox.control.launch import Launcher
from sandbox.control.recovery import recover
from sandbox.control.service import Equipment, TaskService
from sandbox.control.shelf import Shelf
from sandbox.control.telling import Telling
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import SandboxError
from sandbox.placement.control import UnixRunnerControl
from sandbox.placement.local import LocalPlacement
from sandbox.stores.sqlite import SqliteStore
from sandbox.wiring.clock import SystemClock
from sandbox.wiring.machine import choose_run_dir, measure_capacity, name_host, read_boot_id
from sandbox.wiring.private_directory import make_private
from sandbox.wiring.runtime import choose_runtime_name, make_runtime
from sandbox.wiring.settings import ServerSettings
from sandbox.wiring.upstream import read_upstream

RUNNER_COMMAND = (sys.executable, "-I", "-m", "sandbox.wiring.runner")
_RUNNER_VARIABLES = (
    "HOME", "LANG", "LOGNAME", "PATH", "USER", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
    "GIT_CONFIG_GLOBAL", "SSH_AUTH_SOCK", "SSL_CERT_DIR", "SSL_CERT_FILE",
)  # fmt: skip


class DataDirBusyError(SandboxError):
    """Another server works on this data directory."""

    code = "data_dir_busy"


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of one server."""

    data_dir: Path
    run_dir: Path


def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises SandboxError or OSError when the server cannot start."""
    os.umask(0o077)
    data_dir = make_private(settings.data_dir.absolute())
    lock_fd = _lock(data_dir)
    try:
        asyncio.run(_serve(settings, Places(data_dir, choose_run_dir(data_dir))))
    finally:
        os.close(lock_fd)


async def _serve(settings: ServerSettings, places: Places) -> None:
    sockets = bind(settings.host, settings.port)
    stream_sockets = bind(settings.host, settings.ws_port)
    check_loopback([*sockets, *stream_sockets])
    port, stream_port = (bound[0].getsockname()[1] for bound in (sockets, stream_sockets))
    api_settings = ApiSettings(version=__version__, ports=frozenset({port, stream_port}))
    shutting_down = asyncio.Event()
    with set_by_signals(shutting_down):
        service = await _start_service(settings, places)
        try:
            await serve(
                create_app(service, settings=api_settings, shutting_down=shutting_down),
                create_stream_app(service, settings=api_settings, shutting_down=shutting_down),
                sockets,
                stream_sockets,
                shutting_down=shutting_down,
                on_started=lambda: _announce(settings, places, port, stream_port, service.equipment.health.blockers),
            )
        finally:
            await service.close()
            _tell_unfinished(len(service.equipment.follower.feeds))


async def _start_service(settings: ServerSettings, places: Places) -> TaskService:
    agent_program = await asyncio.to_thread(install_binary, places.data_dir)
    probe = await make_runtime(choose_runtime_name(settings.runtime), places.run_dir).probe()
    upstream = read_upstream(os.environ)
    template = LaunchOrder(
        task_id="",
        attempt_id="",
        data_dir=str(places.data_dir),
        run_dir=str(places.run_dir),
        runtime=probe.runtime,
        agent_program=str(agent_program),
        upstream=upstream,
    )
    service = _wire_service(places, probe, template)
    rooms = service.equipment
    for feed in await asyncio.to_thread(recover, rooms.journals, rooms.store, rooms.clock):
        service.take_in(feed)
    return service


def _wire_service(places: Places, probe: Probe, template: LaunchOrder) -> TaskService:
    clock = SystemClock()
    journals = FileJournals(places.data_dir)
    store = SqliteStore(places.data_dir / "index.sqlite")
    broadcast = Broadcast()
    follower = Follower(journals, store, clock, broadcast)
    launcher = Launcher(
        journals, _placement(places), clock, template=template, host=name_host(), boot_id=read_boot_id()
    )
    return TaskService(
        Equipment(
            journals=journals,
            store=store,
            clock=clock,
            runners=UnixRunnerControl(places.run_dir),
            room=WaitingRoom(measure_capacity(places.data_dir)),
            follower=follower,
            launcher=launcher,
            telling=Telling(journals, store, follower, broadcast),
            shelf=Shelf(places.data_dir),
            health=HealthReport(store, clock, places.data_dir, probe, _blockers(probe, template.upstream)),
        )
    )


def _blockers(probe: Probe, upstream: ModelUpstream | None) -> list[str]:
    """What keeps every task from running for as long as this server lives."""
    blockers = []
    if not probe.works:
        blockers.append(f"No runtime works, and nothing runs without one. {probe.mend}")
    if upstream is None:
        blockers.append("There is no key for the model: set ANTHROPIC_API_KEY and start the server again.")
    return blockers


def _placement(places: Places) -> LocalPlacement:
    environment = {name: os.environ[name] for name in _RUNNER_VARIABLES if name in os.environ}

    def log_path(order: LaunchOrder) -> Path:
        path = TaskLayout(places.data_dir, order.task_id).attempt(order.attempt_id).runner_log
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    return LocalPlacement(RUNNER_COMMAND, environment, log_path)


def _announce(settings: ServerSettings, places: Places, port: int, ws_port: int, blockers: Sequence[str]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    http, ws = f"http://{host}:{port}", f"ws://{host}:{ws_port}"
    if settings.announce == "json":
        print(json.dumps({"http": http, "ws": ws, "pid": os.getpid(), "data_dir": str(places.data_dir)}), flush=True)
    else:
        print(f"Sandbox answers at {http}\n  WebSocket: {ws}\n  Data:      {places.data_dir}", flush=True)
    for reason in blockers:
        print(f"It takes no tasks. {reason}", file=sys.stderr, flush=True)


def _tell_unfinished(count: int) -> None:
    """Whoever stops a server may take its tasks for stopped, and they cost money."""
    if count:
        tasks = "1 unfinished task outlives" if count == 1 else f"{count} unfinished tasks outlive"
        print(f"{tasks} the server; the next one on this data directory takes over.", file=sys.stderr)


def _lock(data_dir: Path) -> int:
    """One server a data directory; the lock goes with the process."""
    lock_fd = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock_fd, 32).decode(errors="replace").strip()
        os.close(lock_fd)
        raise DataDirBusyError(
            f"The server with process id {owner} works on {data_dir}; stop it or choose another --data-dir."
        ) from None
    os.ftruncate(lock_fd, 0)
    os.write(lock_fd, f"{os.getpid()}\n".encode())
    return lock_fd
