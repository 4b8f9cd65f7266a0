"""A sandbox made by bubblewrap, from `ready` to its end."""

import asyncio
import os
import signal
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from sandbox.interfaces.runtime import Command, ExitStatus, Stats, Terminal, TerminalSize
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes import sandbox_processes
from sandbox.runtimes.base_sandbox import KILLED_EXIT_CODE, BaseSandbox, SandboxSetup
from sandbox.runtimes.bubblewrap.command_line import build_program_spec
from sandbox.runtimes.exec_terminal import ExecTerminal, start_exec
from sandbox.runtimes.launcher_client import ProgramSpec
from sandbox.runtimes.limits.cgroups import measure_kernel_lock_usage, measure_terminal_usage
from sandbox.runtimes.limits.closing_files import ClosingFilesMeter
from sandbox.runtimes.limits.ext4_kernel_objects import DirectoryMeter
from sandbox.runtimes.limits.kernel_lock_hold_times import KernelLockMeters
from sandbox.runtimes.limits.kernel_usage import FileUsage, KernelUsage
from sandbox.runtimes.limits.measurement_threads import measure_in_thread
from sandbox.runtimes.limits.pending_syscalls import SyscallBufferMeter
from sandbox.runtimes.limits.terminal_cpu_time import TerminalMeter
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
