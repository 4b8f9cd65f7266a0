"""The bubblewrap `Runtime` and its sandboxes, from `ready` to their end."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

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
from sandbox.runtimes import sandbox_processes, seccomp_filter
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.base_sandbox import KILLED_EXIT_CODE, BaseSandbox, SandboxSetup
from sandbox.runtimes.bubblewrap.command_line import (
    build_program_spec,
    exposed_entries,
    exposed_paths,
    prepare_disk_root,
)
from sandbox.runtimes.bubblewrap_confinement import find_bwrap, require_bwrap
from sandbox.runtimes.exec_terminal import ExecTerminal, start_exec
from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, ProgramSpec, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup, measure_kernel_lock_usage, measure_terminal_usage
from sandbox.runtimes.limits.files_without_descriptors import ClosingFilesMeter, SyscallBufferMeter
from sandbox.runtimes.limits.kernel_memory import DirectoryMeter
from sandbox.runtimes.limits.kernel_time import KernelLockMeters, TerminalMeter
from sandbox.runtimes.limits.measurement_scheduling import measure_in_thread
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage
from sandbox.runtimes.probe import RuntimeProperties, run_probe
from sandbox.runtimes.sandbox_processes import wait_for_exit

_START_SECONDS = 30.0
_EXEC_SECONDS = 2.0
_POLL_SECONDS = 0.002
_CHILD_PID_KEY, _EXIT_CODE_KEY = "child-pid", "exit-code"  # keys of bubblewrap's status reports


class BubblewrapSandbox(BaseSandbox):
    """A sandbox on the host's kernel. Implements `Sandbox`; created by `BubblewrapRuntime.create`."""

    def __init__(self, setup: SandboxSetup) -> None:
        super().__init__(setup)
        self._syscall_buffer_meter = SyscallBufferMeter()
        self._closing_files_meter = ClosingFilesMeter()
        self._terminal_meter = TerminalMeter()
        self._lock_meters = KernelLockMeters()
        self._directory_meter = DirectoryMeter(setup.spec.disk)
        self._report_reader: asyncio.StreamReader | None = None
        self._read_lock = asyncio.Lock()
        self._reports: dict[str, int] = {}
        self._init_pidfd: int | None = None

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Start the command. Raises AttemptError (provision_failed, sandbox_lost) if bubblewrap does not start."""
        self._report_reader = await self._execute(command)
        output, errors = await self._open_reader(self._launcher.stdout), await self._open_reader(self._launcher.stderr)
        await self._wait_started(self._report_reader, errors)
        self._watch_exit()
        return output, errors

    def _build_program_spec(self, command: Command, status_fd: int) -> ProgramSpec:
        return build_program_spec(self._program, self._spec, command, status_fd)

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """Run an additional command in the sandbox's namespaces, on a pty. Raises AttemptError (sandbox_lost)."""
        init_pid = self._reports.get(_CHILD_PID_KEY)
        # Until the command has started, the sandbox is incomplete and the host's files may still be visible in it.
        if init_pid is None or await self._find_command(init_pid) is None or self._init_pidfd is None:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The sandbox has ended.")
        # Duplicate the pidfd: the original is closed as soon as the sandbox ends.
        init_descriptor = os.dup(self._init_pidfd)
        try:
            opened = await start_exec(self.handle.attempt_id, init_descriptor, self._add_to_group, command, size)
        finally:
            os.close(init_descriptor)
        return self._track_terminal(ExecTerminal(*opened, self._group.was_oom_killed))

    async def signal(self, signal_number: int) -> None:
        """Signal the command's own process. If the command is still starting, first wait until it runs."""
        init_pid = self._reports.get(_CHILD_PID_KEY)
        pid = None if init_pid is None else await self._find_command(init_pid)
        if init_pid is not None and pid is not None:
            sandbox_processes.send_signal(
                pid, signal_number, lambda one: sandbox_processes.find_first_command(init_pid) == one
            )

    async def _find_command(self, init_pid: int) -> int | None:
        """Return the pid of the command's own process; None if it does not start or has ended."""
        deadline = asyncio.get_running_loop().time() + _EXEC_SECONDS
        while (pid := sandbox_processes.find_first_command(init_pid)) is None and self._is_running():
            if asyncio.get_running_loop().time() > deadline:
                return None
            await asyncio.sleep(_POLL_SECONDS)
        return pid

    async def kill(self) -> None:
        """Kill init, and with it every process in its pid namespace."""
        if self._is_running() and self._init_pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        await super().kill()

    async def stats(self) -> Stats:
        """Return the control group's counters."""
        return self._group.stats()

    def _measure_kernel_usage(self) -> KernelUsage:
        """Return the kernel usage. Blocked threads that may hide open files are interrupted first."""
        self._group.release_files_of_blocked_threads(self._launcher.thread_interrupters)
        return replace(super()._measure_kernel_usage(), disk_directories=self._directory_meter.count())

    def _may_usage_change_while_idle(self) -> bool:
        return any(one.is_due() for one in self._launcher.thread_interrupters) or super()._may_usage_change_while_idle()

    async def terminal_usage(self) -> KernelUsage:
        """Return only the usage of terminals."""
        return await measure_in_thread(measure_terminal_usage, self._group, self._terminal_meter)

    async def kernel_lock_usage(self) -> KernelUsage:
        """Return only the time for which programs inside hold locks that the machine needs."""
        return await measure_in_thread(measure_kernel_lock_usage, self._group, self._lock_meters)

    async def basic_file_usage(self) -> FileUsage:
        """Return the number of open files and directories of all processes inside."""
        return await measure_in_thread(self._group.basic_file_usage)

    async def detailed_file_usage(self) -> FileUsage:
        """Return the open files of all processes inside; they are processes of the host's kernel."""
        return await measure_in_thread(self._group.detailed_file_usage, self._launcher.epoll_counter)

    async def _wait_started(self, status: asyncio.StreamReader, errors: asyncio.StreamReader) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._read_report(status)
        except TimeoutError:
            raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap did not start in time.") from None
        if _CHILD_PID_KEY not in self._reports:
            await self._launcher.raise_if_killed()
            reason = (await errors.read(4096)).decode(errors="replace").strip()
            raise AttemptError(FailureCode.PROVISION_FAILED, f"bubblewrap did not start: {reason}.")

    async def _read_report(self, status: asyncio.StreamReader) -> bool:
        """Read one line of bubblewrap's reports. Returns False at the end of the stream.

        Opens a pidfd for bubblewrap's init as soon as its pid is known.
        """
        async with self._read_lock:
            line = await status.readline()
        with suppress(*DECODE_ERRORS):
            self._reports.update(msgspec.json.decode(line))
        init_pid = self._reports.get(_CHILD_PID_KEY)
        if self._init_pidfd is None and init_pid is not None:
            with suppress(ProcessLookupError):
                self._init_pidfd = os.pidfd_open(init_pid)
        return bool(line)

    async def _wait_for_exit(self) -> ExitStatus:
        """Wait for bubblewrap, then for its init, which ends only after all other processes inside have ended.

        If processes inside do not end after SIGKILL, the exit code is returned after KILL_TIMEOUT_SECONDS. bubblewrap
        reports no exit code if the command could not be run or bubblewrap itself was killed.
        """
        await self._launcher.wait()
        while self._report_reader is not None and await self._read_report(self._report_reader):
            pass
        if self._init_pidfd is not None:
            if not await wait_for_exit(self._init_pidfd):
                self._group.kill()
            os.close(self._init_pidfd)
            self._init_pidfd = None
        code = self._reports.get(_EXIT_CODE_KEY, KILLED_EXIT_CODE if self._was_killed else None)
        return ExitStatus(code, was_oom_killed=code != 0 and self._group.was_oom_killed())


NAME = "bubblewrap"
TIER = "namespaces"
_MEMORY_BYTES = 64 * 1024 * 1024

_PROPERTIES = RuntimeProperties(
    NAME,
    TIER,
    strength=10,
    isolation_notes=(
        "files: only the host's /usr (read-only), the workspace, a home directory and /tmp",
        "processes, users, host name, IPC and control groups: separate namespaces",
        "network: a separate namespace in which only the gateway listens",
        "privileges: no capabilities, no new privileges, a system call filter",
    ),
    gaps=(
        "the host's kernel is shared: a vulnerability in it affects the sandbox",
        "the host path of the workspace is visible inside (/proc/self/mountinfo)",
        "32-bit programs do not run",
    ),
)
_SHARED_UID_GAP = "sandboxes of an ordinary user share that user's kernel uid; those of root have separate ones"
_SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=15000"),
)


async def probe_bubblewrap(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> RuntimeProbe:
    """Create a sandbox, run `true` in it and destroy it. Time limit: see `run_probe`."""
    if os.uname().machine not in seccomp_filter.ARCHITECTURES:
        remedy = f"There is no system call filter for {os.uname().machine}; use another runtime."
        return _PROPERTIES.unavailable_probe(remedy, is_permanent=True)
    if find_bwrap() is None:
        return _PROPERTIES.unavailable_probe("bubblewrap is missing; install it: apt-get install bubblewrap")
    try:
        limits = await run_probe(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _PROPERTIES.unavailable_probe(_explain_failure(str(error)))
    return _PROPERTIES.available_probe(limits, more_gaps=() if os.getuid() == 0 else (_SHARED_UID_GAP,))


def _explain_failure(reason: str) -> str:
    """Return the reason for a failed probe, with the likely remedy."""
    reason = reason.removesuffix(".")
    for name, failing_value, remedy in _SYSCTLS:
        setting = Path("/proc/sys", name)
        if setting.exists() and setting.read_text().strip() == failing_value:
            return f"The kernel does not allow users to create namespaces; allow it: {remedy} ({reason})"
    return f"{reason}. User namespaces must be allowed for ordinary users; some containers forbid them."


class BubblewrapDriver:
    """The launcher execs bubblewrap. All processes and files have the same kernel uid."""

    name = NAME

    def find_program(self) -> str:
        """Return bubblewrap's path."""
        return require_bwrap()

    def files_uid(self, kernel_uid: int) -> int:
        """Return the kernel uid itself."""
        return kernel_uid

    def host_threads_max(self, processes_max: int) -> int:
        """Return `processes_max`, because a process in the sandbox is a process of the host."""
        return processes_max

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher, which exposes the disk, the programs and the system files for bubblewrap."""
        prepare_disk_root(spec)
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            exposed_paths(spec),
            entries=exposed_entries(spec),
            transparent_ports=spec.transparent_ports,
        )

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> BubblewrapSandbox:
        """Create the sandbox object for a launcher that is ready."""
        return BubblewrapSandbox(SandboxSetup(handle, spec, self.find_program(), group, launcher, listeners))


class BubblewrapRuntime(BaseRuntime):
    """Sandboxes on the host's kernel.

    run_dir: private directory with a short path, for the probe's files.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(BubblewrapDriver(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> RuntimeProbe:
        """Create a sandbox, run `true` in it and destroy it."""
        return await probe_bubblewrap(self, self._run_dir, self.hierarchies)
