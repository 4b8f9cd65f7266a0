"""Entry point of a runner: `python -m sandbox.bootstrap.runner --lock-fd=N`. Reads its order from standard input.

Imports few modules of the server, to start fast and use little memory.
"""

import gc

if __name__ == "__main__":
    # Otherwise the objects of imported modules, which are permanent, would be scanned for garbage a hundred times.
    gc.disable()

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from sandbox.agents import registered_agents
from sandbox.bootstrap.clock import SystemClock, read_boot_id
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from sandbox.bootstrap.private_directory import UnsafeDirectoryError, make_private_directory
from sandbox.bootstrap.runtime import make_runtime
from sandbox.disks.directory import DirectoryDisks
from sandbox.disks.loop import LoopDisks, unshare_mounts
from sandbox.disks.removal import remove_trees
from sandbox.disks.space import ReserveFile, measure_disk_space
from sandbox.gateway.egress.dialer import is_dialable
from sandbox.gateway.server import SocketGateways
from sandbox.images.image_store import ImageLeases
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.disks import Disks
from sandbox.interfaces.file_layout import TaskLayout, runner_socket
from sandbox.interfaces.journal import JournalWriter, read_records, replay_task
from sandbox.interfaces.placement import DebugSession, FinishAttempt, Order, Reply, RunAttempt
from sandbox.interfaces.secrets import Redactor
from sandbox.journal.journals import FileJournals
from sandbox.model.disk_space import DiskSpace
from sandbox.model.events import Event
from sandbox.model.limits import JOURNAL_READ_BYTES_PER_SECOND, LAUNCH_SECONDS, RUNNER_RESERVE_BYTES
from sandbox.model.task import Task
from sandbox.placements.local.launch_message import HostSettings, LaunchMessage, decode_launch_message
from sandbox.runner.attempt import AttemptRunner
from sandbox.runner.attempt_recorder import AttemptRecorder, HostDiskSpace
from sandbox.runner.attempt_takeover import check_fencing
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.debug_session import DebugSessionRunner
from sandbox.runner.dependencies import AttemptContext, RunnerDependencies
from sandbox.runner.redaction import redact_event
from sandbox.runner.terminals import TerminalServer
from sandbox.system.cpu_throttle import CpuThrottle
from sandbox.system.log_context import ATTEMPT_ID, TASK_ID
from sandbox.workspace.clone.relay import DialPolicy
from sandbox.workspace.git.host_process import no_confinement
from sandbox.workspace.workspaces import GitWorkspaces

_log = logging.getLogger("sandbox.runner")  # the name of this module is __main__


def main(get_agents: Callable[[], Mapping[str, Agent]] = registered_agents) -> None:
    """Run or finish the attempt in the order, or run a debug session.

    get_agents: returns the agents by the key of their manifest section; the server must have the same ones.
    """
    # The default action of SIGALRM ends the process, which releases the journal's lock even if the process is stuck.
    signal.alarm(int(LAUNCH_SECONDS))
    gc.freeze()  # modules are permanent; exclude them from garbage collection, even at exit
    gc.enable()
    os.umask(0o077)
    log_format, log_level = os.environ.get(FORMAT_VARIABLE, "text"), os.environ.get(LEVEL_VARIABLE, "info")
    configure_logging(log_format, log_level)
    lock_fd = int(sys.argv[-1].removeprefix("--lock-fd="))
    message = _read_message()
    order, host = message.order, message.host
    signal.alarm(_startup_timeout_seconds(order, host))
    TASK_ID.set(order.task_id)
    ATTEMPT_ID.set(order.attempt_id)
    if (redaction := _make_redactor(order.secrets)) is not None:
        configure_logging(log_format, log_level, redaction.redact_text)
    if isinstance(choose_disks(order, host), LoopDisks):
        unshare_mounts()
    if isinstance(order, DebugSession):
        asyncio.run(_run_debug_session(order, host, redaction, get_agents()))
    else:
        asyncio.run(_run_attempt(order, host, lock_fd, redaction, get_agents()))


def _read_message() -> LaunchMessage:
    """Read the launch message from standard input. Exits if the server died while it sent the message."""
    try:
        return decode_launch_message(sys.stdin.buffer.read())
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        _log.info("The server exited before it sent the order; the next server starts another runner")
        sys.exit(1)


def _startup_timeout_seconds(order: Order, host: HostSettings) -> int:
    """Return a timeout that allows reading the whole journal: a busy host must not cause the loss of a task's work."""
    size_bytes = FileJournals(Path(host.data_dir)).size_bytes(order.task_id)
    return math.ceil(LAUNCH_SECONDS + size_bytes / JOURNAL_READ_BYTES_PER_SECOND)


async def _run_attempt(
    order: RunAttempt | FinishAttempt,
    host: HostSettings,
    lock_fd: int,
    redaction: Redactor | None,
    agents: Mapping[str, Agent],
) -> None:
    attempt = build_attempt(order, host, lock_fd, redaction, agents)
    signal.alarm(0)
    runner, is_finisher = AttemptRunner(attempt), isinstance(order, FinishAttempt)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(_control_socket(order, host, runner))
        except (OSError, UnsafeDirectoryError) as error:
            if not is_finisher:
                raise
            _log.warning("Collecting the results of a dead runner without a control socket: %s", error)
        _log.info("Finishing the attempt of a dead runner" if is_finisher else "The attempt starts")
        await (runner.finish() if is_finisher else runner.run())
    _log.info("The attempt has ended", extra={"state": attempt.task.state})
    attempt.recorder.close()


def _control_socket(
    order: Order, host: HostSettings, runner: AttemptRunner
) -> contextlib.AbstractAsyncContextManager[None]:
    """Serve the control socket. Recreate its directory, which a cleaner of temporary files may have removed."""
    run_dir = Path(host.run_dir)
    make_private_directory(run_dir.parent)
    make_private_directory(run_dir)
    return serve_control_socket(runner_socket(run_dir, order.attempt_id), runner.cancel, runner.terminals)


async def _run_debug_session(
    order: DebugSession, host: HostSettings, redaction: Redactor | None, agents: Mapping[str, Agent]
) -> None:
    """Run a debug session. The open descriptor holds its lock until this process ends."""
    data_dir, run_dir = Path(host.data_dir), Path(host.run_dir)
    journals = FileJournals(data_dir)
    task = replay_task(journals, order.task_id).task
    signal.alarm(0)
    if task is None:
        raise ValueError("the task's journal is empty")
    dependencies = _build_dependencies(order, host, journals, _find_agent(task, agents))
    terminals = TerminalServer(redaction, dependencies.throttle.queue())
    launch_spec = dependencies.agent.prepare(task.manifest, session_id="", task_key="", secrets={})
    files = TaskLayout(data_dir, order.task_id).attempt(order.attempt_id)
    session = DebugSessionRunner(order.attempt_id, files, task.manifest.vm, launch_spec, order.image, dependencies)
    make_private_directory(run_dir.parent)
    make_private_directory(run_dir)
    reply = Reply(done=False, message=f"Task {task.id} is {task.state} already.")
    socket = runner_socket(run_dir, order.attempt_id)
    _log.info("A debug session starts")
    await session.run(terminals, lambda: serve_control_socket(socket, lambda _: reply, terminals))
    _log.info("The debug session has ended")


def build_attempt(
    order: RunAttempt | FinishAttempt,
    host: HostSettings,
    lock_fd: int,
    redaction: Redactor | None,
    agents: Mapping[str, Agent],
) -> AttemptContext:
    """Take over the journal and build the attempt's context. Raises StaleOrderError."""
    journals = FileJournals(Path(host.data_dir))
    writer = journals.adopt(order.task_id, lock_fd)
    task = replay_task(journals, order.task_id).task
    newest = journals.find_offset(order.task_id, writer.last_seq)
    check_fencing(order, task, next(read_records(journals, order.task_id, newest), None))
    dependencies = _build_dependencies(order, host, journals, _find_agent(task, agents))
    recorder = _build_recorder(order, host, writer, task, dependencies, redaction)
    upstream, image = (order.upstream, order.image) if isinstance(order, RunAttempt) else (None, None)
    return AttemptContext(
        order.attempt_id,
        Path(host.data_dir),
        upstream,
        recorder,
        dependencies,
        order.secrets,
        redaction,
        image,
        records_conversation=isinstance(order, RunAttempt) and order.records_conversation,
    )


def _build_recorder(
    order: Order,
    host: HostSettings,
    writer: JournalWriter,
    task: Task | None,
    dependencies: RunnerDependencies,
    redaction: Redactor | None,
) -> AttemptRecorder:
    data_dir = Path(host.data_dir)

    def redact(event: Event) -> Event:
        return event if redaction is None else redact_event(event, redaction)

    files = TaskLayout(data_dir, order.task_id).attempt(order.attempt_id)
    reserve = ReserveFile(files.reserve, RUNNER_RESERVE_BYTES)

    def measure() -> DiskSpace:
        """Measure the free space without a released reserve, which is for the end of the task and not for output."""
        space = measure_disk_space(data_dir)
        return space if reserve.is_allocated else space.minus_reserve(RUNNER_RESERVE_BYTES)

    disk_space = HostDiskSpace(measure, host.output_watermark, dependencies.clock)
    return AttemptRecorder(writer, task, dependencies.clock.now, disk_space, reserve, redact)


def _find_agent(task: Task | None, agents: Mapping[str, Agent]) -> Agent:
    """Return the agent that the task's manifest names. Raises ValueError if this version does not have it."""
    kind = "" if task is None else task.manifest.agent.kind
    if kind not in agents:
        raise ValueError(f"there is no agent {kind!r}")
    return agents[kind]


def _build_dependencies(order: Order, host: HostSettings, journals: FileJournals, agent: Agent) -> RunnerDependencies:
    data_dir, throttle = Path(host.data_dir), CpuThrottle()
    follow_redirects = isinstance(order, RunAttempt) and order.follow_redirects  # the other orders do not clone
    return RunnerDependencies(
        journals=journals,
        disks=choose_disks(order, host),
        remove=remove_trees,
        images=ImageLeases(data_dir),
        runtime=make_runtime(host.runtime, Path(host.run_dir), excludes_emulation=host.excludes_emulation),
        gateways=SocketGateways(agent.create_dialect(), throttle=throttle),
        agent=agent.create_driver(Path(host.agent_program(agent.kind))),
        workspaces=GitWorkspaces(os.environ, DialPolicy(is_dialable, follow_redirects)),
        clock=SystemClock(),
        boot_id=read_boot_id(),
        confine=None if host.can_confine else no_confinement,
        throttle=throttle,
    )


def choose_disks(order: Order, host: HostSettings) -> Disks:
    """Choose the kind of disk that an earlier process of the task used, regardless of what the host supports now."""
    if isinstance(order, RunAttempt) and not order.resumes:
        is_loop = host.disk_kind == "loop"
    else:
        layout = TaskLayout(Path(host.data_dir), order.task_id)
        is_loop = any(files.disk_image.exists() for files in layout.attempts())
    return LoopDisks() if is_loop else DirectoryDisks()


def _make_redactor(secrets: Mapping[str, str]) -> Redactor | None:
    """Return a redactor; None without secrets. Redaction is imported only if needed: most tasks have no secrets."""
    if not secrets:
        return None
    from sandbox.secrets.redactor import SecretRedactor

    return SecretRedactor(secrets)


if __name__ == "__main__":
    main()
