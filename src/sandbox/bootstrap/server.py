"""Builds and runs the server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from socket import gethostname, socket
from typing import Any, Literal, NamedTuple, TypeVar

from sandbox import __version__
from sandbox.agents import registered_agents
from sandbox.api.app import create_app, create_stream_app
from sandbox.api.app_context import AppContext
from sandbox.api.auth.authenticator import Authenticator
from sandbox.api.http.server import (
    UnprotectedAddressError,
    bind,
    is_externally_reachable,
    listen,
    serve,
    set_on_signals,
)
from sandbox.api.settings import ApiSettings
from sandbox.auth.token_file import TokenFile
from sandbox.bootstrap.clock import SystemClock, read_boot_id
from sandbox.bootstrap.data_dir_lock import lock_data_dir
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from sandbox.bootstrap.machine import (
    choose_run_dir,
    host_name,
)
from sandbox.bootstrap.private_directory import make_data_dir
from sandbox.bootstrap.runtime import (
    AUTO,
    RuntimeChoice,
    choose_runtime,
    describe_failure,
    make_offered_profiles,
    make_runtime,
)
from sandbox.bootstrap.settings.schema import LogSection, ServerSettings
from sandbox.bootstrap.task_server import ServerDirectories, TaskServer
from sandbox.dashboard.routes import add_dashboard
from sandbox.disks.loop import loop_unavailable_reason
from sandbox.disks.space import ReserveFile, measure_disk_space
from sandbox.images.catalog import ProfileCatalog
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.placement import Host
from sandbox.journal.journals import FileJournals
from sandbox.model.limits import SERVER_RESERVE_BYTES
from sandbox.placements.local.launch_message import HostSettings
from sandbox.placements.local.leftovers import probe_lock_async
from sandbox.placements.local.placement import RUNNER_MODULE, LocalPlacement
from sandbox.runtimes.probe import MachineBusyError, find_confinement_problem
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.runtime_prober import ProbeResult, RuntimeProber


async def can_confine_git(choice: RuntimeChoice, run_dir: Path) -> bool:
    """Return whether git can be confined. If not (see `sandbox doctor`), git runs with the server's privileges.

    Returns True if the host is too busy to determine it: at worst, an attempt ends because its confinement fails. This
    is probed even if no sandbox can be created, because the finisher of an earlier attempt still reads its workspace.
    """
    try:
        reason = await find_confinement_problem(make_runtime(choice.chosen.runtime, run_dir), run_dir)
    except MachineBusyError as busy:
        _log.warning("git runs confined, although two tests of the confinement failed: %s", busy)
        return True
    if reason is not None:
        _log.warning("git runs with the server's privileges, because it cannot be confined: %s", reason)
    return reason is None


AnnounceFormat = Literal["text", "json"]
Result = TypeVar("Result")
_log = logging.getLogger(__name__)

DESCRIPTORS_MAX = 65_536
"""The server's limit of open files, unless the host's is lower. At the limit, new tasks are rejected with 503."""

RUNNER_COMMAND = (sys.executable, "-I", "-m", RUNNER_MODULE)
_RUNNER_VARIABLES = (
    "HOME", "LANG", "LOGNAME", "PATH", "USER", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
    "GIT_CONFIG_GLOBAL", "SSH_AUTH_SOCK", "SSL_CERT_DIR", "SSL_CERT_FILE",
)  # fmt: skip


class AgentSupport(NamedTuple):
    """The agents by the key of their manifest section, and the command of a runner that has the same agents.

    One of the command's arguments is RUNNER_MODULE, which marks a process as a runner.
    """

    agents: Mapping[str, Agent]
    runner_command: Sequence[str] = RUNNER_COMMAND


def run(
    settings: ServerSettings, *, announce: AnnounceFormat = "text", agent_support: AgentSupport | None = None
) -> None:
    """Serve until SIGTERM or SIGINT. Raises SandboxError or OSError if the server cannot start.

    announce: how the addresses are printed once the server is ready: as text, or as one JSON line.
    agent_support: None for Sandbox's own agents.
    """
    os.umask(0o077)
    configure_logging(settings.log.format, settings.log.level)
    _raise_descriptor_limit()
    data_dir = make_data_dir(settings.server.data_dir.absolute())
    with lock_data_dir(data_dir):
        support = agent_support or AgentSupport(registered_agents())
        asyncio.run(_serve(settings, ServerDirectories(data_dir, choose_run_dir(data_dir)), announce, support))


async def _serve(
    settings: ServerSettings, directories: ServerDirectories, announce: AnnounceFormat, support: AgentSupport
) -> None:
    section, token_store = settings.server, TokenFile(directories.data_dir)
    sockets = bind(section.host, section.port)
    stream_sockets = bind(section.host, section.ws_port, "ws_port")
    needs_token = is_externally_reachable([*sockets, *stream_sockets])
    if needs_token and not token_store.list_valid():
        raise UnprotectedAddressError(section.host)
    port, stream_port = (bound[0].getsockname()[1] for bound in (sockets, stream_sockets))
    api_settings = _api_settings(settings, [*sockets, *stream_sockets], needs_token=needs_token, agents=support.agents)
    authenticator = Authenticator(token_store, api_settings)
    shutting_down = asyncio.Event()
    with set_on_signals(shutting_down):
        disk_monitor = _make_disk_monitor(settings, directories)
        probed = await _run_unless_set(shutting_down, _probe_host(settings, directories, support.agents))
        if probed is None:
            _log.warning("Stopped during the first probe of the runtimes.")
            return
        host_probe, prober = probed
        profiles = make_offered_profiles(ProfileCatalog(directories.data_dir), lambda: prober.result.tier)
        api_settings = replace(api_settings, profiles=profiles)
        placement = _make_placement(directories, settings.log, host_probe.host_settings, support.runner_command)
        server = TaskServer(directories, settings, support.agents, prober, placement, token_store, disk_monitor)
        async with server.running():
            context = AppContext.create(server.services, api_settings, shutting_down, authenticator)
            app = create_app(context)
            add_dashboard(app, context)
            listen(sockets)
            listen(stream_sockets, "ws_port")
            await serve(
                app,
                create_stream_app(context),
                sockets,
                stream_sockets,
                shutting_down=shutting_down,
                on_started=lambda: _announce(
                    section.host,
                    directories,
                    (port, stream_port),
                    announce,
                    server.health_check.blocked_reasons,
                ),
            )


def _api_settings(
    settings: ServerSettings, sockets: Sequence[socket], *, needs_token: bool, agents: Mapping[str, Agent]
) -> ApiSettings:
    addresses, ports = zip(*(one.getsockname()[:2] for one in sockets), strict=True)
    own_names: set[str] = set() if needs_token else {*addresses}
    # Any other name of a loopback address may belong to another site.
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
    )


async def _run_unless_set(event: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of `work`; None if the event is set first, which cancels `work` and awaits its cleanup."""
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


class HostProbe:
    """Probes what this host supports, and stores the resulting settings for the host's runners."""

    def __init__(
        self, settings: ServerSettings, directories: ServerDirectories, agent_programs: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._directories = directories
        self._agent_programs = dict(agent_programs)
        self._host_settings: HostSettings | None = None

    async def run(self) -> ProbeResult:
        """Probe the host. Raises OSError, TimeoutError."""
        run_dir = self._directories.run_dir
        async with probe_lock_async(run_dir):
            choice = await choose_runtime(self._settings.server.runtime, run_dir)
            no_loop_reason = await loop_unavailable_reason(run_dir)
            confines = await can_confine_git(choice, run_dir)
        self._host_settings = HostSettings(
            data_dir=str(self._directories.data_dir),
            run_dir=str(run_dir),
            runtime=choice.chosen.runtime,
            excludes_emulation=self._settings.server.runtime == AUTO,
            agent_programs=self._agent_programs,
            disk_kind="plain" if no_loop_reason else "loop",
            can_confine=confines,
            output_watermark=self._settings.disk.output,
        )
        is_final = all(probe.is_final for probe in choice.probes)
        return ProbeResult(choice.probes, choice.chosen.runtime, choice.tier, describe_failure(choice), is_final)

    def host_settings(self) -> HostSettings:
        """Return the settings of the last probe. Call it after `run`."""
        assert self._host_settings is not None
        return self._host_settings


async def _probe_host(
    settings: ServerSettings, directories: ServerDirectories, agents: Mapping[str, Agent]
) -> tuple[HostProbe, RuntimeProber]:
    """Install the agents and probe the host for the first time."""
    programs = {
        kind: str(await asyncio.to_thread(agent.install, directories.data_dir)) for kind, agent in agents.items()
    }
    probe = HostProbe(settings, directories, programs)
    return probe, RuntimeProber(await probe.run(), probe.run, SystemClock())


def _make_disk_monitor(settings: ServerSettings, directories: ServerDirectories) -> DiskMonitor:
    """Create the monitor and check the disk before any file is opened: on a full disk, this releases the reserve."""
    reserve = ReserveFile(directories.data_dir / "reserve", SERVER_RESERVE_BYTES)
    disk_monitor = DiskMonitor(
        directories.data_dir, lambda: measure_disk_space(directories.data_dir), settings.disk.new_tasks, reserve
    )
    disk_monitor.check()
    return disk_monitor


def _make_placement(
    directories: ServerDirectories,
    log: LogSection,
    host_settings: Callable[[], HostSettings],
    runner_command: Sequence[str],
) -> LocalPlacement:
    environment = {name: os.environ[name] for name in _RUNNER_VARIABLES if name in os.environ}
    environment |= {FORMAT_VARIABLE: log.format, LEVEL_VARIABLE: log.level}
    host = Host(host_name(), read_boot_id())
    return LocalPlacement(runner_command, environment, host, host_settings, FileJournals(directories.data_dir))


def _announce(
    listen_host: str,
    directories: ServerDirectories,
    ports: tuple[int, int],
    announce: AnnounceFormat,
    blocked_reasons: Sequence[str],
) -> None:
    host = f"[{listen_host}]" if ":" in listen_host else listen_host
    http, ws = f"http://{host}:{ports[0]}", f"ws://{host}:{ports[1]}"
    if announce == "json":
        print(
            json.dumps({"http": http, "ws": ws, "pid": os.getpid(), "data_dir": str(directories.data_dir)}), flush=True
        )
    else:
        print(f"Sandbox is listening at {http}\n  WebSocket: {ws}\n  Data:      {directories.data_dir}", flush=True)
    _log.info(
        "The server is listening", extra={"http": http, "ws": ws, "pid": os.getpid(), "data_dir": directories.data_dir}
    )
    for reason in blocked_reasons:
        _log.warning("The server does not accept tasks. %s", reason)


def _raise_descriptor_limit() -> None:
    """Raise the limit above the 1024 of most sessions: a waiting task needs two descriptors, a streaming client one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        target = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))
