"""Base class for sandboxes that the launcher execs, from the launcher's `ready` to the sandbox's end."""

import asyncio
import signal
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial

import msgspec
from msgspec.structs import replace

from sandbox.interfaces.runtime import Command, ExitStatus, Listeners, SandboxHandle, SandboxSpec
from sandbox.model.failure import BUSY_KERNEL_MESSAGE, AttemptError, FailureCode
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.runtimes.exec_terminal import ExecTerminal
from sandbox.runtimes.launcher_client import LauncherProcess, ProgramSpec, open_reader
from sandbox.runtimes.limits.cgroups import (
    ControlGroup,
    count_file_locks,
    count_kernel_bytes_outside_cgroup,
    read_group_cpu_seconds,
    read_sibling_stamp,
)
from sandbox.runtimes.limits.files_without_descriptors import (
    ClosingFilesMeter,
    SyscallBufferMeter,
    may_any_measurement_differ,
)
from sandbox.runtimes.limits.kernel_memory import CachedExtentMeter, count_negative_dentries
from sandbox.runtimes.limits.measurement_scheduling import (
    MeasurementPostponer,
    measure_in_thread,
    wait_for_exceeded_limit,
)
from sandbox.runtimes.limits.open_files import FileLockMeter
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage

KILLED_EXIT_CODE = 128 + signal.SIGKILL


class SandboxSetup(msgspec.Struct, frozen=True):
    """The parts of a sandbox whose launcher reported `ready`. program: the program that the launcher will exec."""

    handle: SandboxHandle
    spec: SandboxSpec
    program: str
    group: ControlGroup
    launcher: LauncherProcess
    listeners: Listeners


class BaseSandbox(ABC):
    """Subclasses define how to start the command, how to detect its exit and how to kill all processes inside."""

    def __init__(self, setup: SandboxSetup) -> None:
        self.handle = setup.handle
        self.listeners = setup.listeners
        self.slow_reason = None
        self._spec = setup.spec
        self._program = setup.program
        self._group = setup.group
        self._launcher = setup.launcher
        self._syscall_buffer_meter: SyscallBufferMeter | None = None
        self._closing_files_meter: ClosingFilesMeter | None = None
        self._file_lock_meter = FileLockMeter(
            setup.launcher.slab_statistics,
            partial(count_file_locks, setup.group),
            partial(read_sibling_stamp, setup.group),
        )
        self._extent_meter = CachedExtentMeter(setup.spec.disk, setup.launcher.slab_statistics)
        self._negative_dentries_before = count_negative_dentries()
        self._transports: list[asyncio.Transport] = []
        self._has_started = False
        self._killed_at: float | None = None
        """When `kill` was first called, by the clock of the event loop."""

        self._exit_task: asyncio.Task[ExitStatus] | None = None
        self._terminals: list[ExecTerminal] = []

    @abstractmethod
    async def _wait_for_exit(self) -> ExitStatus:
        """Return the command's exit status when no process is left inside, or after KILL_TIMEOUT_SECONDS."""

    @abstractmethod
    def _build_program_spec(self, command: Command, status_fd: int) -> ProgramSpec:
        """Return the program that the launcher execs.

        status_fd: descriptor for the program's reports; ownership passes to this method.
        """

    async def _execute(self, command: Command) -> asyncio.StreamReader:
        """Make the launcher exec the sandbox's program and return the stream of its reports. Raises AttemptError."""
        if self._has_started:
            raise AttemptError(FailureCode.PROVISION_FAILED, "A sandbox runs only one command; create another sandbox.")
        self._has_started = True
        reports, child_status = socket.socketpair()
        with child_status:
            reader = await self._open_reader(reports)
            program_spec = self._build_program_spec(command, child_status.dup().detach())
            try:
                self._launcher.exec_program(program_spec.argv, command.stdin, program_spec.descriptors)
            except OSError as error:
                raise AttemptError(FailureCode.SANDBOX_LOST, f"The sandbox has ended: {error.strerror}.") from error
            finally:
                program_spec.close()
        return reader

    async def kill(self) -> None:
        """Kill all processes inside: the sandbox through its program, other processes through the control group."""
        if self._is_running():
            if self._killed_at is None:
                self._killed_at = asyncio.get_running_loop().time()
            self._launcher.kill()
            self._group.kill()

    async def wait(self) -> ExitStatus:
        """Return the command's exit status; see `Sandbox.wait`."""
        return await asyncio.shield(self._watch_exit())

    async def wait_for_exceeded_limit(self) -> str:
        """Poll the usage of the sandbox; see `Sandbox.wait_for_exceeded_limit`."""
        kernel_bytes_outside_cgroup = partial(count_kernel_bytes_outside_cgroup, self._group)
        return await wait_for_exceeded_limit(
            self.kernel_usage,
            self.basic_file_usage,
            self.detailed_file_usage,
            kernel_bytes_outside_cgroup,
            self.terminal_usage,
            self.kernel_lock_usage,
            MeasurementPostponer(partial(read_group_cpu_seconds, self._group), self._may_usage_change_while_idle),
        )

    def _may_usage_change_while_idle(self) -> bool:
        """Return whether the next kernel usage may differ from the last although no program has run. Takes 0.1 ms."""
        return (
            self._launcher.is_slab_reading_due()
            or self._extent_meter.is_due()
            or may_any_measurement_differ(self._syscall_buffer_meter, self._closing_files_meter)
        )

    async def kernel_usage(self) -> KernelUsage:
        """Return the kernel usage of the control group, of the launcher's network namespace and of the disk.

        Cheap enough to call ten times a second.
        """
        return await measure_in_thread(self._measure_kernel_usage)

    def _measure_kernel_usage(self) -> KernelUsage:
        meters = self._syscall_buffer_meter, self._closing_files_meter
        usage = self._launcher.kernel_usage(self._group, self._spec.memory_bytes, *meters)
        return replace(usage, file_locks=self._file_lock_meter.count(), cached_extents=self._extent_meter.count())

    async def terminal_usage(self) -> KernelUsage:
        """Return only the usage of terminals. Unlike `kernel_usage`, it does not wait on a busy machine.

        This implementation measures nothing: only programs that share the host's kernel can use terminals of the host.
        """
        return KernelUsage()

    async def kernel_lock_usage(self) -> KernelUsage:
        """Return only the time for which the sandbox holds locks that the machine needs.

        This implementation measures nothing, because programs inside a separate kernel do not hold the host's locks
        themselves. The host programs that read files for this kernel hold them briefly.
        """
        return KernelUsage()

    async def basic_file_usage(self) -> FileUsage:
        """Return the number of open files and directories. Takes no lock that programs inside can hold for long.

        This implementation counts nothing: only programs that share the host's kernel can block `detailed_file_usage`
        with their locks.
        """
        return FileUsage()

    @abstractmethod
    async def detailed_file_usage(self) -> FileUsage:
        """Return the open files; for a sandbox with a separate kernel, only directories that the host opened for it.

        Slow if many files are open.
        """

    async def close(self) -> None:
        """End the sandbox and release its resources. Raises AttemptError (sandbox_lost) after KILL_TIMEOUT_SECONDS."""
        await self.kill()
        try:
            async with asyncio.timeout(KILL_TIMEOUT_SECONDS):
                await self.wait()
        except TimeoutError:
            raise AttemptError(FailureCode.SANDBOX_LOST, BUSY_KERNEL_MESSAGE) from None
        await asyncio.to_thread(self._group.reclaim_if_many_negative_dentries, self._negative_dentries_before)
        for terminal in self._terminals:
            await terminal.hang_up()
            await terminal.wait()
        for transport in self._transports:
            transport.abort()
        self._launcher.close()
        self.listeners.close()

    def _track_terminal(self, terminal: ExecTerminal) -> ExecTerminal:
        """Register the terminal, so that it is closed together with the sandbox."""
        self._terminals = [one for one in self._terminals if not one.has_ended] + [terminal]
        return terminal

    def _add_to_group(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            self._group.add(pid)

    @property
    def _was_killed(self) -> bool:
        return self._killed_at is not None

    def _is_running(self) -> bool:
        return self._exit_task is None or not self._exit_task.done()

    def _watch_exit(self) -> asyncio.Task[ExitStatus]:
        if self._exit_task is None:
            self._exit_task = asyncio.create_task(self._wait_for_exit())
        return self._exit_task

    async def _open_reader(self, source: socket.socket) -> asyncio.StreamReader:
        reader, transport = await open_reader(source)
        self._transports.append(transport)
        return reader
