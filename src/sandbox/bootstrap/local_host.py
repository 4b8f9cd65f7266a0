"""The host of this process: its capacity, load and runtime, and the placement that starts runners on it."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from sandbox.bootstrap.clock import read_boot_id
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE
from sandbox.bootstrap.runtime_selection import AUTO, RuntimeChoice, choose_runtime, describe_failure, make_runtime
from sandbox.bootstrap.settings.schema import OvercommitSection, ServerSettings
from sandbox.disks.commands import remove_trees
from sandbox.disks.loop_disk import MountHolderLeftovers, loop_unavailable_reason
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.journal import TaskReplicas
from sandbox.interfaces.placement import HostIdentity, LeftoverSource, ProbeResult
from sandbox.interfaces.server_services import HostLoad
from sandbox.journal.journals import FileJournals
from sandbox.model.resources import Resources
from sandbox.placements.local.attempt_files import (
    LocalAttemptFiles,
    SandboxLeftovers,
    SocketLeftovers,
    probe_lock_async,
)
from sandbox.placements.local.placement import LocalPlacement
from sandbox.placements.local.runner_starters import (
    FORK_SERVER_MODULE,
    NOT_RENEWED,
    RUNNER_MODULE,
    RunnerForkServer,
    RunnerSettings,
    RunnerSpawner,
    RunnerStarter,
)
from sandbox.runtimes.probe import InconclusiveProbeError, find_confinement_problem

RUNNER_COMMAND = (sys.executable, "-I", "-m", RUNNER_MODULE)
FORK_SERVER_COMMAND = (sys.executable, "-I", "-m", FORK_SERVER_MODULE)
RUNNER_VARIABLES = (
    "HOME", "LANG", "LOGNAME", "PATH", "USER", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR",
    "GIT_CONFIG_GLOBAL", "SSH_AUTH_SOCK", "SSL_CERT_DIR", "SSL_CERT_FILE",
)  # fmt: skip
_log = logging.getLogger(__name__)


def measure_capacity(data_dir: Path, factors: OvercommitSection) -> Resources:
    """Return the capacity for tasks: the CPUs that this process may use, memory, and the data directory's disk.

    Each is multiplied by its overcommit factor.
    """
    disk = os.statvfs(data_dir)
    return Resources(
        cpus=int(len(os.sched_getaffinity(0)) * factors.cpus),
        memory_bytes=int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * factors.memory),
        disk_bytes=int(disk.f_blocks * disk.f_frsize * factors.disk),
    )


class AgentsAndCommands(NamedTuple):
    """The agents, keyed by their manifest section, and the commands that start runners with the same agents.

    runner_command: see `RunnerSpawner`. fork_server_command: see `RunnerForkServer`.
    """

    agents: Mapping[str, Agent]
    runner_command: Sequence[str] = RUNNER_COMMAND
    fork_server_command: Sequence[str] = FORK_SERVER_COMMAND


class PlacementContext(NamedTuple):
    """What a server passes to its placements.

    data_dir, run_dir: the directories of this process, which holds a lock on `data_dir`.
    replicas: copies into `data_dir` what runners on other hosts write.
    """

    data_dir: Path
    run_dir: Path
    settings: ServerSettings
    agents_and_commands: AgentsAndCommands
    replicas: TaskReplicas

    @property
    def agents(self) -> Mapping[str, Agent]:
        """The agents, keyed by their manifest section."""
        return self.agents_and_commands.agents


async def can_confine_git(choice: RuntimeChoice, run_dir: Path) -> bool:
    """Return whether git can be confined. If not (see `sandbox doctor`), git runs with the server's privileges.

    Returns True if the host is too busy to determine this: at worst, an attempt ends because its confinement fails. The
    confinement is probed even if no sandbox can be created, because a finisher still reads the workspace of an earlier
    attempt.
    """
    try:
        reason = await find_confinement_problem(make_runtime(choice.chosen.runtime, run_dir), run_dir)
    except InconclusiveProbeError as inconclusive:
        _log.warning("git runs confined, although two tests of the confinement failed: %s", inconclusive)
        return True
    if reason is not None:
        _log.warning("git runs with the server's privileges, because it cannot be confined: %s", reason)
    return reason is None


class LocalHost:
    """Implements `interfaces.placement.Host`, and stores the settings of the host's runners.

    agent_programs: path of each agent's executable, keyed by the agent's manifest section.
    """

    def __init__(self, context: PlacementContext, agent_programs: Mapping[str, str]) -> None:
        # A colon would select another placement.
        self.identity = HostIdentity(socket.gethostname().replace(":", "-"), read_boot_id())
        self.capacity = measure_capacity(context.data_dir, context.settings.capacity)
        self.images = ProfileCatalog(context.data_dir)
        self._context = context
        self._agent_programs = dict(agent_programs)
        self._runner_settings: RunnerSettings | None = None
        self._working_result: ProbeResult | None = None
        """The result of the first probe in which a runtime worked."""

    def blocked_reason(self) -> None:
        """Return None, because the server itself checks this host and its disk, which runners share."""

    def memory_available_bytes(self) -> int | None:
        """Implements `Host.memory_available_bytes`."""
        return read_memory_available_bytes()

    async def probe(self) -> ProbeResult:
        """Implements `Host.probe`. The runners' settings do not change once a runtime has worked."""
        if self._working_result is not None:
            return await self._probe_again(self._working_result)
        run_dir, settings = self._context.run_dir, self._context.settings
        async with probe_lock_async(run_dir):
            choice = await choose_runtime(settings.server.runtime, run_dir)
            no_loop_reason = await loop_unavailable_reason(run_dir)
            confines = await can_confine_git(choice, run_dir)
        self._runner_settings = RunnerSettings(
            data_dir=str(self._context.data_dir),
            run_dir=str(run_dir),
            runtime=choice.chosen.runtime,
            excludes_emulation=settings.server.runtime == AUTO,
            agent_programs=self._agent_programs,
            disk_kind="plain" if no_loop_reason else "loop",
            can_confine=confines,
            output_watermark=settings.disk.output,
        )
        is_permanent = all(probe.is_permanent for probe in choice.probes)
        result = ProbeResult(choice.probes, choice.chosen.runtime, choice.tier, describe_failure(choice), is_permanent)
        if result.failure is None:
            self._working_result = result
        return result

    async def _probe_again(self, working: ProbeResult) -> ProbeResult:
        run_dir, settings = self._context.run_dir, self._context.settings
        async with probe_lock_async(run_dir):
            runtime = make_runtime(working.runtime, run_dir, excludes_emulation=settings.server.runtime == AUTO)
            probe = await runtime.probe()
        probes = [probe if other.runtime == probe.runtime else other for other in working.probes]
        return replace(working, probes=probes, failure=describe_failure(RuntimeChoice(probe, [probe])))

    def runner_settings(self) -> RunnerSettings:
        """Return the settings from the last probe. Must be called after `probe`."""
        assert self._runner_settings is not None
        return self._runner_settings


def make_leftover_sources(data_dir: Path, run_dir: Path) -> Sequence[LeftoverSource]:
    """Create the objects that find and remove leftovers of attempts, in the order in which leftovers are removed."""
    return (
        # Every runtime can end the sandboxes of all runtimes. The runtime `bubblewrap` can do so even if no runtime's
        # program is installed.
        SandboxLeftovers(make_runtime("bubblewrap", run_dir)),
        MountHolderLeftovers(data_dir),
        SocketLeftovers(run_dir),
    )


async def create_local_placement(context: PlacementContext) -> LocalPlacement:
    """Install the agents and create the placement of the server's host, whose runners outlive the server.

    The host must be probed before a runner starts.
    """
    starter = RunnerForkServer(context.agents_and_commands.fork_server_command, _runner_environment(context))
    return await _create_placement(context, starter, lease_deadline=None)


async def create_worker_placement(
    context: PlacementContext, parent_death_pipe_fd: int, credentials_fd: int
) -> LocalPlacement:
    """Install the agents and create the placement of a worker's host, whose runners communicate only under a lease.

    parent_death_pipe_fd, credentials_fd: see `RunnerSpawner`. The host must be probed before a runner starts.
    """
    starter = RunnerSpawner(
        context.agents_and_commands.runner_command, _runner_environment(context), parent_death_pipe_fd, credentials_fd
    )
    return await _create_placement(context, starter, lease_deadline=NOT_RENEWED)


def _runner_environment(context: PlacementContext) -> dict[str, str]:
    environment = {name: os.environ[name] for name in RUNNER_VARIABLES if name in os.environ}
    log = context.settings.log
    return environment | {FORMAT_VARIABLE: log.format, LEVEL_VARIABLE: log.level}


async def _create_placement(
    context: PlacementContext, starter: RunnerStarter, lease_deadline: float | None
) -> LocalPlacement:
    data_dir, run_dir = context.data_dir, context.run_dir
    programs = {kind: str(await asyncio.to_thread(agent.install, data_dir)) for kind, agent in context.agents.items()}
    host = LocalHost(context, programs)
    return LocalPlacement(
        starter,
        data_dir,
        run_dir,
        host,
        lambda: replace(host.runner_settings(), lease_deadline=lease_deadline),
        FileJournals(data_dir),
        LocalAttemptFiles(data_dir, make_leftover_sources(data_dir, run_dir), remove_trees),
    )


def read_memory_available_bytes() -> int | None:
    """Return the memory available without swapping (proc(5), meminfo, MemAvailable); None if it is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def measure_host_load() -> HostLoad:
    """Read the CPU ticks and the memory of this host (proc(5), stat and meminfo). Raises OSError, ValueError."""
    with Path("/proc/stat").open() as lines:
        # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time.
        ticks = [int(field) for field in lines.readline().split()[1:9]]
    available = read_memory_available_bytes()
    if len(ticks) < 4 or available is None:
        raise ValueError("/proc/stat or /proc/meminfo has an unknown format")
    return HostLoad(
        cpu_busy_ticks=sum(ticks) - sum(ticks[3:5]),
        cpu_total_ticks=sum(ticks),
        memory_available_bytes=available,
        memory_total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
