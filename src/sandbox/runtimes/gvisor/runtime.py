"""The gVisor `Runtime` and its sandboxes, from `ready` to their end.

The launcher execs runsc. Additional runsc processes run through programs/runsc_exec.py.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import (
    Command,
    ExitStatus,
    Listeners,
    Runtime,
    RuntimeProbe,
    SandboxHandle,
    SandboxSpec,
    Stats,
    Terminal,
    TerminalSize,
)
from sandbox.model.errors import DECODE_ERRORS, SandboxError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.primitives.concurrency import wait_readable_shared
from sandbox.runtimes import sandbox_processes, seccomp_filter
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.base_sandbox import KILLED_EXIT_CODE, BaseSandbox, SandboxSetup
from sandbox.runtimes.exec_terminal import ExecProcess, ExecTerminal, start_on_pty, start_program
from sandbox.runtimes.gvisor import command_lines
from sandbox.runtimes.gvisor.command_lines import STATE_DIRECTORY, exposed_entries
from sandbox.runtimes.kernel_uid_pool import FILES_UIDS_OFFSET, SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, ProgramSpec, create_memfd, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.limits.measurement_scheduling import measure_in_thread
from sandbox.runtimes.limits.usage_limits import FileUsage
from sandbox.runtimes.probe import RuntimeProperties, run_probe
from sandbox.runtimes.programs import launcher
from sandbox.runtimes.sandbox_filesystem import DISK_DIRECTORIES

_LOST_PEER_ERRORS = ("input/output error", "eof", "broken pipe", "connection reset by peer")


class _SandboxProcess(msgspec.Struct):
    pid: int = 0


class RunscState(msgspec.Struct):
    """Content of runsc's state file. `sandbox`: the process that is the sandbox's kernel."""

    status: str = ""
    sandbox: _SandboxProcess = msgspec.field(default_factory=_SandboxProcess)

    @property
    def is_running(self) -> bool:
        """Whether the command has started."""
        return self.status == "running" and self.sandbox.pid > 0


class _LogMessage(msgspec.Struct):
    msg: str = ""
    level: str = ""


def read_state(runsc_pid: int, attempt_id: str) -> RunscState:
    """Read the current state. Returns an empty state if the file is missing or incomplete, or runsc has ended."""
    path = Path(f"/proc/{runsc_pid}/root{STATE_DIRECTORY}/{attempt_id}_sandbox:{attempt_id}.state")
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunscState)
    except (OSError, *DECODE_ERRORS):
        return RunscState()


def is_lost_peer_error(error: str) -> bool:
    """Return whether runsc failed because another gVisor process was killed."""
    return error.casefold().endswith(_LOST_PEER_ERRORS)


def last_error(log: bytes) -> str:
    """Return the last error in a log of JSON lines; empty if the log contains no error."""
    error = ""
    for line in log.splitlines():
        try:
            message = msgspec.json.decode(line, type=_LogMessage)
        except DECODE_ERRORS:
            continue
        if message.level == "error":
            error = message.msg
    return error


_START_SECONDS = 30.0
_POLL_SECONDS = 0.002
_MEMORY_CHECK_SECONDS = 0.5
_DESCRIPTORS_PER_DIRECTORY = 2
"""Number of host descriptors for each directory open in the sandbox: one to look up entries, one to list them."""

_RUNSC_FAILED = 128
"""Exit code of a failed runsc. If a command exits with the same code, the log contains no error."""

_RUN_SECONDS = 10.0
_RUNSC_EXEC_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); import runsc_exec; runsc_exec.main(sys.argv[1:])"
_PROCESS_FD, _LOG_FD, _STARTED_FD = range(launcher.FIRST_HIGH_DESCRIPTOR, launcher.FIRST_HIGH_DESCRIPTOR + 3)
"""Descriptors of a runsc process that runs on a pty."""


class GvisorSandbox(BaseSandbox):
    """A sandbox on gVisor's kernel. Implements `Sandbox`; created by `GvisorRuntime.create`."""

    def __init__(self, setup: SandboxSetup) -> None:
        super().__init__(setup)
        self._log: asyncio.StreamReader | None = None
        self._runsc_pidfd: int | None = None
        self._has_command_started = False
        self._failure_reason = "it ended without an error message"

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Start the command. Raises AttemptError (provision_failed, sandbox_lost) if it does not start."""
        self._log = await self._execute(command)
        output, errors = await self._open_reader(self._launcher.stdout), await self._open_reader(self._launcher.stderr)
        self._watch_exit()
        await self._wait_started()
        return output, errors

    def _build_program_spec(self, command: Command, status_fd: int) -> ProgramSpec:
        self._runsc_pidfd = os.pidfd_open(self._launcher.pid)
        return command_lines.build_program_spec(self._program, self._spec, command, status_fd)

    async def _wait_started(self) -> None:
        """Wait until the command runs according to runsc's state file, or has ended."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while self._is_running() and not self._has_command_started:
            if asyncio.get_running_loop().time() > deadline:
                raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor did not start in time.")
            self._has_command_started = read_state(self._launcher.pid, self.handle.attempt_id).is_running
            await asyncio.sleep(_POLL_SECONDS)
        if not self._has_command_started and (await self.wait()).code is None:
            await self._launcher.raise_if_killed()
            code = (
                FailureCode.SANDBOX_LOST if is_lost_peer_error(self._failure_reason) else FailureCode.PROVISION_FAILED
            )
            raise AttemptError(code, f"gVisor did not start: {self._failure_reason}.")

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """Run an additional command with another runsc process, on a pty. Raises AttemptError (sandbox_lost).

        The pty belongs to the launcher's devpts.
        """
        if self._runsc_pidfd is None or not self._has_command_started or not self._is_running():
            raise AttemptError(FailureCode.SANDBOX_LOST, "The sandbox has ended.")
        numbers = (_PROCESS_FD, _LOG_FD, _STARTED_FD)
        words = command_lines.exec_arguments(self._program, self.handle.attempt_id, *numbers)
        # Duplicate the pidfd: the original is closed as soon as the sandbox ends.
        runsc_fd = os.dup(self._runsc_pidfd)
        try:
            opened = await _start_runsc_on_pty(
                self.handle.attempt_id, runsc_fd, self._add_to_group, words, command_lines.encode_process(command), size
            )
        finally:
            os.close(runsc_fd)
        return self._track_terminal(ExecTerminal(*opened, self._group.was_oom_killed))

    async def signal(self, signal_number: int) -> None:
        """Signal the command's own process with another runsc process."""
        if self._runsc_pidfd is None or not self._has_command_started or not self._is_running():
            return
        runsc_fd = os.dup(self._runsc_pidfd)
        try:
            words = command_lines.kill_arguments(self._program, self.handle.attempt_id, signal_number)
            with suppress(OSError):
                await _run_runsc(self.handle.attempt_id, runsc_fd, words)
        finally:
            os.close(runsc_fd)

    async def stats(self) -> Stats:
        """Return the control group's counters, without its process count, which covers gVisor's own processes."""
        counted = self._group.stats()
        return Stats(counted.cpu_seconds, counted.memory_bytes, None, oom_kills=counted.oom_kills)

    async def detailed_file_usage(self) -> FileUsage:
        """Count only the directories that gVisor has open on the host.

        The memory of other open files is charged to the control group.
        """
        return await measure_in_thread(
            self._group.directory_usage, descriptors_per_directory=_DESCRIPTORS_PER_DIRECTORY
        )

    async def _wait_for_exit(self) -> ExitStatus:
        """Wait for runsc, then kill all processes that it started, for up to KILL_TIMEOUT_SECONDS.

        If `kill` was called, the time counts from the call: the runner does not wait longer, and then collects the
        results with programs in the same control group.
        """
        await self._wait_for_runsc()
        killed_at = asyncio.get_running_loop().time() if self._killed_at is None else self._killed_at
        deadline = killed_at + KILL_TIMEOUT_SECONDS
        while self._has_processes() and asyncio.get_running_loop().time() < deadline:
            self._group.kill()
            await asyncio.sleep(_POLL_SECONDS)
        if self._runsc_pidfd is not None:
            os.close(self._runsc_pidfd)
            self._runsc_pidfd = None
        code = await self._read_exit_code()
        was_oom_killed = code != 0 and self._group.was_oom_killed()
        return ExitStatus(KILLED_EXIT_CODE if code is None and was_oom_killed else code, was_oom_killed=was_oom_killed)

    async def _wait_for_runsc(self) -> None:
        """Wait for runsc. If one of gVisor's processes is OOM-killed, kill the rest, which would wait forever."""
        ended = asyncio.ensure_future(self._launcher.wait())
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=_MEMORY_CHECK_SECONDS)
                if not ended.done() and self._group.was_oom_killed():
                    self._launcher.kill()
                    self._group.kill()
        finally:
            ended.cancel()

    def _has_processes(self) -> bool:
        uid = self.handle.details.get("kernel_uid")
        return bool(
            self._group.process_ids()
            if self._group.directories or uid is None
            else sandbox_processes.find_by_uid(int(uid))
        )

    async def _read_exit_code(self) -> int | None:
        """Return the exit code: KILLED_EXIT_CODE after `kill`; None if runsc failed or was killed otherwise."""
        code = self._launcher.exit_code
        if code is None or code < 0 or self._log is None:
            return KILLED_EXIT_CODE if self._was_killed else None
        self._failure_reason = last_error(await self._log.read()) if code == _RUNSC_FAILED else ""
        return None if self._failure_reason else code


async def _run_runsc(attempt_id: str, runsc_pidfd: int, argv: Sequence[str]) -> bool:
    """Run runsc until it exits, for at most 10 s. Returns whether it succeeded. Raises OSError.

    runsc does not run in the sandbox's control group, so that a busy sandbox does not delay it. It has separate limits.
    """
    process, control = start_program(_RUNSC_EXEC_PROGRAM, attempt_id, 0, 0)
    ended_fd = os.pidfd_open(process.pid)
    try:
        with control, suppress(OSError):
            _send(control, runsc_pidfd, argv)
            async with asyncio.timeout(_RUN_SECONDS):
                await wait_readable_shared(ended_fd)
    finally:
        # The wait does not block: the process has ended or was just killed.
        process.kill()
        os.close(ended_fd)
        code = process.wait()
    return code == 0


async def _start_runsc_on_pty(
    attempt_id: str,
    runsc_pidfd: int,
    add_to_group: Callable[[int], None],
    argv: Sequence[str],
    process_config: bytes,
    size: TerminalSize,
) -> tuple[ExecProcess, int, int]:
    """Start runsc on a pty. Returns its process, the pty's master and runsc's pidfd.

    process_config: content of process.json, which runsc reads from _PROCESS_FD. Errors: see `start_on_pty`.
    """
    contents = {"process": process_config, "messages": b"", "begun": b""}
    return await start_on_pty(
        lambda: start_program(_RUNSC_EXEC_PROGRAM, attempt_id, size.rows, size.columns),
        add_to_group,
        lambda control: _send(
            control,
            runsc_pidfd,
            argv,
            *(create_memfd(name, content) for name, content in contents.items()),
        ),
    )


def _send(control: socket.socket, runsc_pidfd: int, argv: Sequence[str], *files: int) -> None:
    """Send the command and `files`, and close the files. Raises OSError if the process is gone."""
    words_file = create_memfd("words", "\0".join(argv).encode(errors="surrogateescape"))
    try:
        socket.send_fds(control, [b"join"], [runsc_pidfd, words_file, *files])
    finally:
        for file in (words_file, *files):
            os.close(file)


NAME = "gvisor"
TIER = "gvisor"
_PROGRAMS = (Path("/usr/bin/runsc"), Path("/usr/local/bin/runsc"))
_MEMORY_BYTES = 256 * 1024 * 1024

_PROPERTIES = RuntimeProperties(
    NAME,
    TIER,
    strength=20,
    isolation_notes=(
        "system calls: handled by gVisor's kernel, a program that may use few system calls of the host",
        "files: only the host's /usr (read-only), the workspace, a home directory and /tmp",
        "processes, users, host name, IPC: exist only in gVisor's kernel",
        "network: a separate namespace in which only the gateway listens",
        "privileges: none on the host; a separate kernel uid",
    ),
    gaps=(
        "the agent's own programs can read the agent's environment, because gVisor runs only readable programs",
        "TCP and UDP are handled by the host's kernel, in the sandbox's own network namespace",
        "running out of memory ends the whole sandbox, not one process",
        "reaching the process limit is visible to the agent, but not shown in the task's status",
        "each start takes about 0.2 s, and file operations take longer than on the host's kernel",
    ),
)


def find_runsc() -> str | None:
    """Return runsc's path. Looks in fixed locations, not in PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


async def probe_gvisor(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> RuntimeProbe:
    """Create a sandbox, run `true` in it and destroy it. Time limit: see `run_probe`."""
    if find_runsc() is None:
        return _PROPERTIES.unavailable_probe(
            "runsc is missing; install it: apt-get install runsc", is_permanent=os.getuid() != 0
        )
    if os.getuid() != 0:
        remedy = "gVisor needs two kernel uids per sandbox, which only root can set; run the server as root."
        return _PROPERTIES.unavailable_probe(remedy, is_permanent=True)
    try:
        limits = await run_probe(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _PROPERTIES.unavailable_probe(str(error))
    return _PROPERTIES.available_probe(limits)


_THREADS_PER_PROCESS = 4
"""Maximum number of host threads for each process in the sandbox."""

_GVISOR_KERNEL_THREADS = 256
"""Maximum number of host threads of gVisor itself."""


class GvisorDriver:
    """The launcher execs runsc. gVisor runs under the kernel uid; the agent's files have a uid that no process uses."""

    name = NAME

    def find_program(self) -> str:
        """Return runsc's path. Raises AttemptError (provision_failed) if it is missing."""
        program = find_runsc()
        if program is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "runsc is missing; install it (package runsc).")
        return program

    def files_uid(self, kernel_uid: int) -> int:
        """Return the uid that is mapped to 1000 in the sandbox."""
        return kernel_uid + FILES_UIDS_OFFSET

    def host_threads_max(self, processes_max: int) -> int:
        """Return a limit higher than gVisor's own process limit, in case gVisor does not enforce its limit."""
        return processes_max * _THREADS_PER_PROCESS + _GVISOR_KERNEL_THREADS

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher, which exposes the sandbox's complete file system. Raises OSError, AttemptError."""
        if kernel_uid is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor needs root; run the server as root.")
        paths_by_name = {name: spec.disk / name for name in DISK_DIRECTORIES}
        files_uid = self.files_uid(kernel_uid)
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            paths_by_name,
            files_uid=files_uid,
            entries=exposed_entries(spec),
            seccomp_filter=seccomp_filter.assemble_socket_and_extent_filter(os.uname().machine),
            transparent_ports=spec.transparent_ports,
        )

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> GvisorSandbox:
        """Create the sandbox object for a launcher that is ready."""
        return GvisorSandbox(SandboxSetup(handle, spec, self.find_program(), group, launcher, listeners))


class GvisorRuntime(BaseRuntime):
    """Sandboxes on gVisor's kernel. Needs root.

    run_dir: private directory with a short path, for the probe's files.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(GvisorDriver(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> RuntimeProbe:
        """Create a sandbox, run `true` in it and destroy it."""
        return await probe_gvisor(self, self._run_dir, self.hierarchies)
