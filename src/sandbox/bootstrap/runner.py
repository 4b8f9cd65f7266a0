"""Entry point of a runner: `python -m sandbox.bootstrap.runner --lock-fd=N`.

Reads its order from standard input. `placements.local.runner_starters.RunnerSpawner` describes the options
`--parent-death-pipe-fd=N` and `--credentials-fd=N`. `bootstrap.runner_fork_server` is the other entry point.

Imports only a few server modules, so that it starts fast and uses little memory.
"""

import gc

if __name__ == "__main__":
    # During the imports, the garbage collector would scan the permanent objects of modules a hundred times.
    gc.disable()

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec

from sandbox.agents import registered_agents
from sandbox.bootstrap.clock import SystemClock, read_boot_id
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from sandbox.bootstrap.private_directories import UnsafeDirectoryError, make_private_directory
from sandbox.bootstrap.runtime_selection import make_runtime
from sandbox.disks.commands import remove_trees
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.disks.loop_disk import LoopDisk, unshare_mounts
from sandbox.disks.reserve_file import ReserveFile, measure_disk_space
from sandbox.gateway.communication_lease import CommunicationLease
from sandbox.gateway.egress.policy import is_dialable
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.images.image_store import ImageLocks as HostImageLocks
from sandbox.interfaces.agent import Agent, AgentDriver
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk, DiskReserve, RemovePaths
from sandbox.interfaces.gateway import GatewayFactory
from sandbox.interfaces.images import ImageLocks
from sandbox.interfaces.journal import JournalWriter
from sandbox.interfaces.runner import FinishAttempt, Order, Reply, RunAttempt, RunDebugSession
from sandbox.interfaces.runtime import Confine, Runtime
from sandbox.interfaces.secrets import Redactor
from sandbox.interfaces.task_file_layout import TaskLayout, runner_socket
from sandbox.interfaces.workspace import FindCredentials, Workspaces
from sandbox.journal.journals import FileJournals
from sandbox.model.events import Event
from sandbox.model.fixed_limits import JOURNAL_READ_BYTES_PER_SECOND_MIN, LAUNCH_TIMEOUT_SECONDS, RUNNER_RESERVE_BYTES
from sandbox.model.resources import DiskSpace
from sandbox.model.task import Task
from sandbox.placements.local.runner_starters import LaunchMessage, RunnerSettings, decode_launch_message
from sandbox.primitives.log_context import ATTEMPT_ID, TASK_ID
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.attempt import AttemptCloser, AttemptRunner, DeadRunnerFinisher, check_order_is_current
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.attempt_recorder import AttemptRecorder, HostDiskSpace, redact_event
from sandbox.runner.control_socket import RenewHandler, record_cancel, serve_control_socket
from sandbox.runner.debug_session_runner import DebugSessionRunner, launch_spec_without_agent
from sandbox.runner.steps.collect import CollectStep
from sandbox.runner.steps.prepare_workspace import ClonedWorkspace, PrepareWorkspaceStep, ResumedWorkspace
from sandbox.runner.steps.provision import ProvisionStep, make_confine
from sandbox.runner.steps.run import RunStep
from sandbox.runner.steps.teardown import TeardownStep
from sandbox.runner.terminals import TerminalServer
from sandbox.workspace.clone.remote_access import ServerCredentials
from sandbox.workspace.clone.socks_proxy import DialPolicy
from sandbox.workspace.no_confinement import no_confinement
from sandbox.workspace.workspaces import GitWorkspaces

_OPTIONS = frozenset({"--lock-fd", "--parent-death-pipe-fd", "--credentials-fd"})
_log = logging.getLogger("sandbox.runner")  # the name of this module is __main__


class RunnerParts(msgspec.Struct, frozen=True):
    """The components of a runner, which only this module connects.

    disk_space: the data directory's free space. reserve: the attempt's disk reserve.
    confine: confines host programs; None means that the runtime confines them.
    boot_id: the host's current boot.
    throttle: limits the CPU usage of all work that a sandbox causes in its runner.
    redactor: removes the values of the task's secrets; None if the task has no secrets.
    """

    data_dir: Path
    journals: FileJournals
    disk: Disk
    remove_paths: RemovePaths
    image_locks: ImageLocks
    runtime: Runtime
    workspaces: Workspaces
    disk_space: HostDiskSpace
    reserve: DiskReserve
    clock: Clock
    boot_id: str
    confine: Confine | None = None
    throttle: CpuThrottle = msgspec.field(default_factory=CpuThrottle)
    redactor: Redactor | None = None


def main(get_agents: Callable[[], Mapping[str, Agent]] = registered_agents) -> None:
    """Run a runner whose lock and other descriptors are options. Does not return.

    get_agents: returns the agents, keyed by their manifest section; the server must have the same agents.
    """
    arguments = [argument.partition("=") for argument in sys.argv[1:]]
    options = {name: int(value) for name, _, value in arguments if name.startswith("--")}
    if unknown := options.keys() - _OPTIONS:
        sys.exit(f"unknown option {', '.join(sorted(unknown))}: the caller has a different version from this runner")
    run_order(
        get_agents,
        options["--lock-fd"],
        parent_death_pipe_fd=options.get("--parent-death-pipe-fd"),
        credentials_fd=options.get("--credentials-fd"),
    )


def run_order(
    get_agents: Callable[[], Mapping[str, Agent]],
    lock_fd: int,
    *,
    parent_death_pipe_fd: int | None = None,
    credentials_fd: int | None = None,
) -> NoReturn:
    """Read the order from stdin: run an attempt, finish one whose runner died, or run a debug session. Then exit.

    get_agents: see `main`. lock_fd: the lock of the journal or, in a debug session, of the preserved disk. The runner
    holds it until it exits.
    parent_death_pipe_fd, credentials_fd: see `RunnerSpawner`.
    """
    # The default action of SIGALRM ends the process, which releases the journal's lock even if the process is stuck.
    signal.alarm(int(LAUNCH_TIMEOUT_SECONDS))
    gc.freeze()  # modules are permanent; exclude them from garbage collection, even at exit
    gc.enable()
    os.umask(0o077)
    log_format, log_level = os.environ.get(FORMAT_VARIABLE, "text"), os.environ.get(LEVEL_VARIABLE, "info")
    configure_logging(log_format, log_level)
    if parent_death_pipe_fd is not None:
        die_with_parent_pipe(parent_death_pipe_fd)
    worker = None
    if credentials_fd is not None:
        worker = socket.socket(fileno=credentials_fd)
        worker.set_inheritable(False)
    message = _read_message()
    order, runner_settings = message.order, message.settings
    journals = FileJournals(Path(runner_settings.data_dir))
    signal.alarm(_startup_timeout_seconds(journals, order.task_id))
    TASK_ID.set(order.task_id)
    ATTEMPT_ID.set(order.attempt_id)
    if (redactor := _make_redactor(order.secrets)) is not None:
        configure_logging(log_format, log_level, redactor.redact_text)
    find_credentials = None if worker is None else ServerCredentials(worker, order.attempt_id).find
    parts = _create_parts(order, runner_settings, journals, redactor, find_credentials)
    if isinstance(parts.disk, LoopDisk):
        unshare_mounts()
    match order:
        case RunAttempt():
            asyncio.run(_run_attempt(order, runner_settings, lock_fd, parts, get_agents()))
        case FinishAttempt():
            asyncio.run(_finish_attempt(order, runner_settings, lock_fd, parts, get_agents()))
        case RunDebugSession():
            asyncio.run(_run_debug_session(order, runner_settings, parts, get_agents()))
    logging.shutdown()
    os._exit(0)  # otherwise, the interpreter would destroy every object and thus copy shared memory


def die_with_parent_pipe(inherited_fd: int) -> None:
    """Make the kernel kill this process when the last writer of the pipe ends. Closes the descriptor.

    The kernel sends SIGKILL itself (fcntl(2), O_ASYNC and F_SETSIG), so it also ends a process that is stopped or
    stuck. The pipe is opened again, because the receiver of the signal belongs to the open file description, which all
    runners of a worker inherit.
    """
    parent_pipe = os.open(f"/proc/self/fd/{inherited_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(inherited_fd)
    fcntl.fcntl(parent_pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent_pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(parent_pipe, fcntl.F_SETFL, fcntl.fcntl(parent_pipe, fcntl.F_GETFL) | os.O_ASYNC)
    ended = select.poll()
    ended.register(parent_pipe, 0)
    if ended.poll(0):  # the writer ended earlier, so no signal follows
        os.kill(os.getpid(), signal.SIGKILL)


def _read_message() -> LaunchMessage:
    """Read the launch message from standard input. Exits if the server died while sending the message."""
    try:
        return decode_launch_message(sys.stdin.buffer.read())
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        _log.info("The server exited before it sent the order; it starts another runner when it has restarted")
        sys.exit(1)


def _startup_timeout_seconds(journals: FileJournals, task_id: str) -> int:
    """Return a timeout that is long enough to read the whole journal, even on a busy host."""
    return math.ceil(LAUNCH_TIMEOUT_SECONDS + journals.size_bytes(task_id) / JOURNAL_READ_BYTES_PER_SECOND_MIN)


async def _run_attempt(
    order: RunAttempt, runner_settings: RunnerSettings, lock_fd: int, parts: RunnerParts, agents: Mapping[str, Agent]
) -> None:
    writer, task = _take_over_journal(order, parts.journals, lock_fd)
    agent = agents.get(task.manifest.agent.kind)
    if agent is None:
        raise ValueError(f"there is no agent {task.manifest.agent.kind!r}")
    lease = None if runner_settings.lease_deadline is None else CommunicationLease(runner_settings.lease_deadline)
    gateways = SocketGatewayFactory(agent.create_dialect(), throttle=parts.throttle, lease=lease)
    recorder = create_recorder(parts, writer, task)
    attempt = AttemptContext(
        order.attempt_id,
        parts.data_dir,
        recorder,
        order.secrets,
        parts.redactor,
        order.upstream,
        order.image,
        order.records_conversation,
        order.keeps_session,
    )
    terminals = TerminalServer(parts.redactor, parts.throttle.queue())
    runner = build_runner(attempt, parts, agent, _create_driver(agent, runner_settings), gateways, terminals)
    signal.alarm(0)
    async with _control_socket(runner_settings, attempt, terminals, None if lease is None else lease.renew):
        _log.info("The attempt starts")
        await runner.run()
    _log.info("The attempt has ended", extra={"state": attempt.task.state})
    recorder.close()


async def _finish_attempt(
    order: FinishAttempt, runner_settings: RunnerSettings, lock_fd: int, parts: RunnerParts, agents: Mapping[str, Agent]
) -> None:
    writer, task = _take_over_journal(order, parts.journals, lock_fd)
    agent = agents.get(task.manifest.agent.kind)
    recorder = create_recorder(parts, writer, task)
    attempt = AttemptContext(
        order.attempt_id, parts.data_dir, recorder, order.secrets, parts.redactor, keeps_session=order.keeps_session
    )
    finisher = build_finisher(attempt, parts, None if agent is None else _create_driver(agent, runner_settings))
    signal.alarm(0)
    async with contextlib.AsyncExitStack() as stack:
        try:
            terminals = TerminalServer(None, parts.throttle.queue())  # rejects every client: there is no sandbox
            await stack.enter_async_context(_control_socket(runner_settings, attempt, terminals))
        except (OSError, UnsafeDirectoryError) as error:
            _log.warning(
                "The control socket could not be opened; collecting the dead runner's results without it: %s", error
            )
        _log.info("Finishing the attempt of a dead runner")
        await finisher.finish()
    _log.info("The attempt has ended", extra={"state": attempt.task.state})
    recorder.close()


def _control_socket(
    runner_settings: RunnerSettings,
    attempt: AttemptContext,
    terminals: TerminalServer,
    renew: RenewHandler | None = None,
) -> contextlib.AbstractAsyncContextManager[None]:
    """Serve the control socket. Recreate its directory, which may have been removed as an old temporary file."""
    socket = _prepare_socket(runner_settings, attempt.id)
    return serve_control_socket(socket, partial(record_cancel, attempt.recorder), terminals, renew)


def _prepare_socket(runner_settings: RunnerSettings, attempt_id: str) -> Path:
    """Create the directory of the control socket if it is missing; return the path of the socket."""
    run_dir = Path(runner_settings.run_dir)
    make_private_directory(run_dir.parent)
    make_private_directory(run_dir)
    return runner_socket(run_dir, attempt_id)


async def _run_debug_session(
    order: RunDebugSession, runner_settings: RunnerSettings, parts: RunnerParts, agents: Mapping[str, Agent]
) -> None:
    """Run a debug session. The inherited descriptor holds the session's lock until this process ends."""
    task = parts.journals.replay(order.task_id).task
    signal.alarm(0)
    if task is None:
        raise ValueError("the task's journal is empty")
    agent = agents.get(task.manifest.agent.kind)
    terminals = TerminalServer(parts.redactor, parts.throttle.queue())
    session = DebugSessionRunner(
        order.attempt_id,
        TaskLayout(parts.data_dir, order.task_id).attempt(order.attempt_id),
        task.manifest.vm,
        launch_spec_without_agent(task.manifest)
        if agent is None
        else _create_driver(agent, runner_settings).prepare(task.manifest, session_id="", gateway_key="", secrets={}),
        order.image,
        parts.runtime,
        parts.disk,
        parts.image_locks,
        parts.clock,
    )
    socket = _prepare_socket(runner_settings, order.attempt_id)
    reply = Reply(done=False, message=f"Task {task.id} is already {task.state}.")
    _log.info("A debug session starts")
    await session.run(terminals, lambda: serve_control_socket(socket, lambda _: reply, terminals))
    _log.info("The debug session has ended")


def _take_over_journal(
    order: RunAttempt | FinishAttempt, journals: FileJournals, lock_fd: int
) -> tuple[JournalWriter, Task]:
    """Take over the journal's lock; return the writer and the recorded task. Raises StaleOrderError."""
    writer = journals.adopt(order.task_id, lock_fd)
    task = journals.replay(order.task_id).task
    newest = journals.find_offset(order.task_id, writer.last_seq)
    last_record = next(iter(journals.read(order.task_id, newest).records), None)
    return writer, check_order_is_current(order, task, last_record)


def _create_driver(agent: Agent, runner_settings: RunnerSettings) -> AgentDriver:
    return agent.create_driver(Path(runner_settings.agent_program(agent.kind)))


def _create_parts(
    order: Order,
    runner_settings: RunnerSettings,
    journals: FileJournals,
    redactor: Redactor | None,
    find_credentials_on_server: FindCredentials | None,
) -> RunnerParts:
    """Create the components."""
    data_dir, clock = Path(runner_settings.data_dir), SystemClock()
    clone_follows_redirects = isinstance(order, RunAttempt) and order.clone_follows_redirects
    reserve = ReserveFile(TaskLayout(data_dir, order.task_id).attempt(order.attempt_id).reserve, RUNNER_RESERVE_BYTES)

    def measure() -> DiskSpace:
        """Measure the free space for output. Exclude a released reserve, which is needed to record the task's end."""
        space = measure_disk_space(data_dir)
        return space if reserve.is_allocated else space.minus_reserve(RUNNER_RESERVE_BYTES)

    return RunnerParts(
        data_dir=data_dir,
        journals=journals,
        disk=choose_disk(order, runner_settings),
        remove_paths=remove_trees,
        image_locks=HostImageLocks(data_dir),
        runtime=make_runtime(
            runner_settings.runtime,
            Path(runner_settings.run_dir),
            excludes_emulation=runner_settings.excludes_emulation,
        ),
        workspaces=GitWorkspaces(
            os.environ, DialPolicy(is_dialable, clone_follows_redirects), find_credentials_on_server
        ),
        disk_space=HostDiskSpace(measure, runner_settings.output_watermark, clock),
        reserve=reserve,
        clock=clock,
        boot_id=read_boot_id(),
        confine=None if runner_settings.can_confine else no_confinement,
        redactor=redactor,
    )


def create_recorder(parts: RunnerParts, writer: JournalWriter, task: Task | None) -> AttemptRecorder:
    """Create the recorder of an attempt. task: the task in the journal; None if the journal is empty."""
    redactor = parts.redactor

    def redact(event: Event) -> Event:
        return event if redactor is None else redact_event(event, redactor)

    return AttemptRecorder(parts.journals, writer, task, parts.clock.now, parts.disk_space, parts.reserve, redact)


def build_runner(
    attempt: AttemptContext,
    parts: RunnerParts,
    agent: Agent,
    driver: AgentDriver,
    gateways: GatewayFactory,
    terminals: TerminalServer,
) -> AttemptRunner:
    """Connect an attempt's steps to their components."""
    confine = _choose_confine(attempt, parts)
    source = ResumedWorkspace(attempt) if attempt.resumes else ClonedWorkspace(attempt, parts.workspaces, confine)
    return AttemptRunner(
        attempt,
        PrepareWorkspaceStep(attempt, source, parts.runtime, parts.disk, parts.remove_paths, parts.clock),
        ProvisionStep(attempt, driver, parts.runtime, parts.image_locks),
        RunStep(attempt, agent, driver, gateways, terminals, parts.disk, parts.clock, parts.throttle),
        _build_closer(attempt, parts, driver, confine),
    )


def build_finisher(attempt: AttemptContext, parts: RunnerParts, driver: AgentDriver | None) -> DeadRunnerFinisher:
    """Connect an attempt's finisher to its components. driver: None if this version does not have the agent."""
    closer = _build_closer(attempt, parts, driver, _choose_confine(attempt, parts))
    return DeadRunnerFinisher(attempt, parts.runtime, parts.boot_id, closer)


def _choose_confine(attempt: AttemptContext, parts: RunnerParts) -> Confine:
    return make_confine(attempt, parts.runtime) if parts.confine is None else parts.confine


def _build_closer(
    attempt: AttemptContext, parts: RunnerParts, driver: AgentDriver | None, confine: Confine
) -> AttemptCloser:
    collect = CollectStep(attempt, parts.journals, parts.workspaces, confine, parts.disk_space, parts.clock, driver)
    teardown = TeardownStep(attempt, parts.runtime, parts.disk, parts.remove_paths)
    return AttemptCloser(attempt, collect, teardown, parts.disk, parts.journals, driver)


def choose_disk(order: Order, runner_settings: RunnerSettings) -> Disk:
    """Choose the kind of disk: the kind that the task already uses or, for a new disk, the one the host supports."""
    layout = TaskLayout(Path(runner_settings.data_dir), order.task_id)
    if isinstance(order, RunAttempt) and not order.resumes:
        is_loop = runner_settings.disk_kind == "loop"
    else:
        is_loop = any(files.disk_image.exists() for files in layout.attempts())
    return (LoopDisk if is_loop else DirectoryDisk)(layout.attempt(order.attempt_id))


def _make_redactor(secrets: Mapping[str, str]) -> Redactor | None:
    """Return a redactor; None if there are no secrets.

    Redaction is imported only if needed, because most tasks have no secrets.
    """
    if not secrets:
        return None
    from sandbox.secrets.redaction.redactor import SecretRedactor

    return SecretRedactor(secrets)


if __name__ == "__main__":
    main()
