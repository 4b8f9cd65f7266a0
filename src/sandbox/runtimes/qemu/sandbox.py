"""A sandbox in a QEMU guest, from its boot to its end."""

import asyncio
import os
import signal
import socket
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from sandbox.interfaces.runtime import (
    Command,
    ExitStatus,
    Listeners,
    SandboxHandle,
    SandboxSpec,
    Stats,
    Terminal,
    TerminalSize,
)
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.failure import BUSY_KERNEL_MESSAGE, AttemptError, FailureCode
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.runtimes.launcher_client import (
    LauncherProcess,
    ProgramSpec,
    open_reader,
    refuse_passed_descriptors,
    reject_nul,
)
from sandbox.runtimes.limits.cgroups import ControlGroup, count_kernel_bytes_outside_cgroup, read_group_cpu_seconds
from sandbox.runtimes.limits.kernel_memory import CachedExtentMeter, DirectoryMeter, count_negative_dentries
from sandbox.runtimes.limits.measurement_scheduling import (
    MeasurementPostponer,
    measure_in_thread,
    wait_for_exceeded_limit,
)
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage
from sandbox.runtimes.qemu.channel import Channel, GuestStream, QemuTerminal
from sandbox.runtimes.qemu.command_lines import GuestSpec, QemuDescriptors, build_program_spec
from sandbox.runtimes.qemu.guest import frames
from sandbox.runtimes.sandbox_processes import wait_for_exit

_START_SECONDS = 60.0
_STATS_SECONDS = 1.0
GUEST_TERMINALS_MAX = 200
_KILLED_EXIT_CODE = 128 + signal.SIGKILL


class BootError(Exception):
    """The guest's agent did not start. The message describes how far the boot got.

    has_timed_out: the time limit was exceeded, so the guest may still have been booting.
    """

    def __init__(self, message: str, *, has_timed_out: bool = False) -> None:
        super().__init__(message)
        self.has_timed_out = has_timed_out


class QemuSandbox:
    """A sandbox in a guest. Implements `Sandbox`; created by `QemuRuntime.create`. The guest's frames are untrusted."""

    def __init__(
        self,
        handle: SandboxHandle,
        guest_spec: GuestSpec,
        program: str,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> None:
        self.handle = handle
        self.listeners = listeners
        self._guest_spec = guest_spec
        self._program = program
        self._group = group
        self._launcher = launcher
        self._channel = Channel(self._handle_frame)
        self._console, self._stderr = OutputTail(), OutputTail()
        self._extent_meter = CachedExtentMeter(guest_spec.spec.disk, launcher.slab_statistics)
        self._directory_meter = DirectoryMeter(guest_spec.spec.disk)
        self._negative_dentries_before = count_negative_dentries()
        self._streams = {
            number: GuestStream(self._channel, number) for number in (frames.STDOUT_STREAM, frames.STDERR_STREAM)
        }
        self._terminals: dict[int, QemuTerminal] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started: asyncio.Future[str] | None = None
        self._reported_exit: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self._stats_reply: asyncio.Future[tuple[int, ...]] | None = None
        self._init_pidfd: int | None = None
        self._report_transport: asyncio.Transport | None = None
        self._was_killed = False
        self._exit_task: asyncio.Task[ExitStatus] | None = None
        self.slow_reason = guest_spec.slow_reason

    async def boot(self, timeout_seconds: float) -> None:
        """Boot the guest and wait for the agent's response.

        Raises BootError, and AttemptError (provision_failed) if nothing starts.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                reports = await self._execute()
                await self._console.open(self._launcher.stdout)
                await self._stderr.open(self._launcher.stderr)
                await self._open_init_pidfd(reports)
                await _wait_first(self._ready, self._channel.ended)
        except TimeoutError:
            raise BootError(
                f"it took longer than {timeout_seconds:.0f} s; {self._last_output_line()}", has_timed_out=True
            ) from None
        except OSError as error:
            raise BootError(f"its files cannot be opened: {error.strerror or error}") from error
        if not self._ready.done():
            raise BootError(self._last_output_line())

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Start the command. Raises AttemptError (provision_failed)."""
        if self._started is not None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "A sandbox runs only one command; create another sandbox.")
        self._started = asyncio.get_running_loop().create_future()
        self._channel.send(frames.START, frames.COMMAND_STREAM, _encode_command(command) + command.stdin)
        self._watch_exit()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _wait_first(self._started, self._channel.ended)
        except TimeoutError:
            raise AttemptError(FailureCode.PROVISION_FAILED, "The guest did not start the command in time.") from None
        if not self._started.done():
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The guest has ended: {self._last_output_line()}")
        if self._started.result():
            self._streams[frames.STDERR_STREAM].feed(f"sandbox: {self._started.result()}\n".encode())
        return self._streams[frames.STDOUT_STREAM].reader, self._streams[frames.STDERR_STREAM].reader

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """Run an additional command on a terminal, through the guest agent. Raises AttemptError (sandbox_lost)."""
        if self._started is None or not self._is_running() or len(self._terminals) >= GUEST_TERMINALS_MAX:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The sandbox has ended, or has too many terminals.")
        number = next(one for one in range(frames.FIRST_TERMINAL_STREAM, 256) if one not in self._terminals)
        terminal = self._terminals[number] = QemuTerminal(self._channel, number)
        self._channel.send(
            frames.START, number, _encode_command(command) + frames.SIZE_BODY.pack(size.rows, size.columns)
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _wait_first(terminal.start_result, self._channel.ended)
        except TimeoutError:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The terminal was not ready in time; try again.") from None
        reason = terminal.start_result.result() if terminal.start_result.done() else "the guest has ended"
        if reason:
            raise AttemptError(FailureCode.SANDBOX_LOST, f"The sandbox could not be entered: {reason}.")
        return terminal

    async def signal(self, signal_number: int) -> None:
        """Signal the command's own process."""
        self._channel.send(frames.SIGNAL, frames.COMMAND_STREAM, bytes([signal_number]))

    async def kill(self) -> None:
        """Kill the whole guest immediately."""
        if self._is_running():
            self._was_killed = True
            self._kill_jail()

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
            postponer=MeasurementPostponer(
                partial(read_group_cpu_seconds, self._group), self._may_usage_change_while_idle
            ),
        )

    def _may_usage_change_while_idle(self) -> bool:
        return self._launcher.is_slab_reading_due() or self._extent_meter.is_due()

    async def kernel_usage(self) -> KernelUsage:
        """Return the usage of QEMU and virtiofsd. Objects of the guest's kernel are in the guest's memory."""
        return await measure_in_thread(self._measure_kernel_usage)

    def _measure_kernel_usage(self) -> KernelUsage:
        usage = self._launcher.kernel_usage(self._group, self._guest_spec.spec.memory_bytes)
        return replace(usage, cached_extents=self._extent_meter.count(), disk_directories=self._directory_meter.count())

    async def basic_file_usage(self) -> FileUsage:
        """Return no counts, because programs inside cannot block `detailed_file_usage` by holding a lock."""
        return FileUsage()

    async def detailed_file_usage(self) -> FileUsage:
        """Return the directories that virtiofsd has open for listing.

        The memory of other files is charged to the group.
        """
        return await measure_in_thread(self._group.directory_usage, descriptors_per_directory=1)

    async def stats(self) -> Stats:
        """Return the statistics of the guest, with the host's CPU time, because QEMU uses it on the host.

        The OOM kills of both are added up. If the guest does not answer within 1 s, return those of the host.
        """
        host_stats = self._group.stats()
        guest_stats = await self._request_stats()
        return host_stats if guest_stats is None else merge_stats(host_stats, guest_stats, self._guest_spec.spec)

    async def close(self) -> None:
        """End the sandbox and release its resources. Raises AttemptError (sandbox_lost) after KILL_TIMEOUT_SECONDS."""
        await self.kill()
        try:
            async with asyncio.timeout(KILL_TIMEOUT_SECONDS):
                await self.wait()
        except TimeoutError:
            raise AttemptError(FailureCode.SANDBOX_LOST, BUSY_KERNEL_MESSAGE) from None
        # virtiofsd looked up names in the host's own directories, such as /usr, and the kernel has cached these names.
        await asyncio.to_thread(self._group.reclaim_if_many_negative_dentries, self._negative_dentries_before)
        for one in (self._channel, self._console, self._stderr, self._report_transport):
            if one is not None:
                one.abort()
        self._launcher.close()
        self.listeners.close()

    def _is_running(self) -> bool:
        return self._exit_task is None or not self._exit_task.done()

    def _is_booting(self) -> bool:
        return not self._ready.done()

    def _watch_exit(self) -> asyncio.Task[ExitStatus]:
        if self._exit_task is None:
            self._exit_task = asyncio.create_task(self._wait_for_exit())
        return self._exit_task

    async def _execute(self) -> asyncio.StreamReader:
        """Make the launcher exec the jail and return the stream of bubblewrap's reports."""
        status, status_inside = socket.socketpair()
        host_socket, guest_socket = socket.socketpair()
        refuse_passed_descriptors(host_socket)
        with status_inside, guest_socket:
            reports, self._report_transport = await open_reader(status)
            await self._channel.open(host_socket)
            program_spec = self._build_program_spec(guest_socket, status_inside)
        try:
            self._launcher.exec_program(program_spec.argv, b"", program_spec.descriptors)
        except OSError as error:
            raise BootError(f"the sandbox has ended: {error.strerror}") from error
        finally:
            program_spec.close()
        return reports

    def _build_program_spec(self, guest_socket: socket.socket, status: socket.socket) -> ProgramSpec:
        with ExitStack() as opened:
            accelerator = self._open_accelerator()
            opened.callback(os.close, accelerator)
            files = _connect_virtiofsd(self._guest_spec.run_dir, self.handle.attempt_id)
            opened.pop_all()
        return build_program_spec(
            self._program,
            self._guest_spec,
            QemuDescriptors(*files, guest_socket.detach(), accelerator),
            status.detach(),
        )

    def _open_accelerator(self) -> int:
        device = self._guest_spec.accelerator.device
        try:
            return os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BootError(f"{device} cannot be opened: {error.strerror}") from error

    async def _open_init_pidfd(self, status: asyncio.StreamReader) -> None:
        """Open a pidfd of the jail's init, which ends only when all other processes in the jail have ended."""
        with suppress(*DECODE_ERRORS, KeyError, ProcessLookupError):
            self._init_pidfd = os.pidfd_open(msgspec.json.decode(await status.readline())["child-pid"])

    async def _wait_for_exit(self) -> ExitStatus:
        ended = asyncio.create_task(self._launcher.wait())
        await _wait_first(ended, self._reported_exit, self._channel.ended)
        self._kill_jail()
        await ended
        is_over = True
        if self._init_pidfd is not None:
            is_over = await wait_for_exit(self._init_pidfd)
            os.close(self._init_pidfd)
            self._init_pidfd = None
        # Abort only if the guest never booted or the jail did not exit. Otherwise, the channel may still contain output
        # that the guest sent before it ended.
        if self._is_booting() or not is_over:
            self._channel.abort()
        await self._channel.ended
        reported = (
            self._reported_exit.result()
            if self._reported_exit.done()
            else ExitStatus(_KILLED_EXIT_CODE if self._was_killed else None)
        )
        for stream in self._streams.values():
            stream.finish()
        for terminal in self._terminals.values():
            terminal.finish(ExitStatus(_KILLED_EXIT_CODE if self._was_killed else None))
        return reported if reported.code == 0 or not self._group.was_oom_killed() else ExitStatus(reported.code, True)

    def _kill_jail(self) -> None:
        if self._init_pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        self._launcher.kill()
        self._group.kill()

    def _handle_frame(self, kind: bytes, number: int, body: bytes) -> bool:
        """Handle a frame from the guest. Returns whether the frame was output. Invalid frames are ignored."""
        terminal = self._terminals.get(number)
        if terminal is not None:
            is_output = terminal.handle_frame(kind, body)
            if terminal.has_ended:
                del self._terminals[number]
            return is_output
        if kind == frames.DATA and number in self._streams:
            return self._streams[number].feed(body)
        self._handle_reply(kind, number, body)
        return False

    def _handle_reply(self, kind: bytes, number: int, body: bytes) -> None:
        if kind == frames.READY and number == frames.COMMAND_STREAM:
            _set_result(self._ready if self._started is None else self._started, "")
        elif kind == frames.FAILED and number == frames.COMMAND_STREAM:
            self._report_failed_start(body)
        elif kind == frames.EXIT and number == frames.COMMAND_STREAM and len(body) == frames.EXIT_BODY.size:
            code, was_oom_killed = frames.EXIT_BODY.unpack(body)
            _set_result(self._reported_exit, ExitStatus(code if 0 <= code < 256 else None, was_oom_killed))
        elif kind == frames.STATS and len(body) == frames.STATS_BODY.size:
            _set_result(self._stats_reply, frames.STATS_BODY.unpack(body))

    def _report_failed_start(self, reason: bytes) -> None:
        """Record that the command could not be run, so it has no exit status."""
        _set_result(self._reported_exit, ExitStatus(None))
        _set_result(self._started, reason.decode(errors="replace"))

    async def _request_stats(self) -> tuple[int, ...] | None:
        if self._stats_reply is None:
            self._stats_reply = asyncio.get_running_loop().create_future()
            self._channel.send(frames.GET_STATS, 0)
        request = self._stats_reply
        await asyncio.wait({request}, timeout=_STATS_SECONDS)
        if request is self._stats_reply:
            self._stats_reply = None
        return request.result() if request.done() else None

    def _last_output_line(self) -> str:
        text = (self._stderr.text.strip() or self._console.text.strip()).decode(errors="replace")
        return text.splitlines()[-1][-300:] if text else "it ended without an error message"


def merge_stats(host_stats: Stats, guest_stats: tuple[int, ...], spec: SandboxSpec) -> Stats:
    """Combine the host's statistics with the guest's, which are capped at the memory and processes of the guest."""
    memory, processes, oom_kills, fork_failures = guest_stats
    return Stats(
        cpu_seconds=host_stats.cpu_seconds,
        memory_bytes=min(memory, spec.memory_bytes),
        processes=min(processes, spec.processes_max),
        oom_kills=oom_kills + host_stats.oom_kills,
        fork_failures=fork_failures,
    )


def _set_result(future: "asyncio.Future[Any] | None", value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)


async def _wait_first(*futures: "asyncio.Future[Any]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _encode_command(command: Command) -> bytes:
    variables = {"PWD": command.directory, **command.environment}
    lists = [[command.directory], command.argv, [f"{name}={value}" for name, value in variables.items()]]
    reject_nul(word for strings in lists for word in strings)
    return frames.pack_string_lists(*([word.encode(errors="surrogateescape") for word in words] for words in lists))


def _connect_virtiofsd(run_dir: Path, attempt_id: str) -> tuple[int, int]:
    """Return virtiofsd's listening socket and QEMU's connection, which is pending. The socket's path is removed.

    No other process can connect first, because the directory is private.
    """
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f"{attempt_id}.files"
    # a socket's path has at most 107 bytes
    path = f"/proc/self/fd/{directory}/{name}"
    listener, connection = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with listener, connection:
        try:
            listener.bind(path)
            listener.listen(1)
            connection.connect(path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            os.close(directory)
        return listener.detach(), connection.detach()


class OutputTail(asyncio.Protocol):
    """The last output of a host process, for error messages.

    Reading is throttled: a guest can make QEMU write to the console byte by byte forever.
    """

    def __init__(self) -> None:
        self.text = b""
        self._received_bytes = 0
        self._transport: asyncio.Transport | None = None

    async def open(self, source: socket.socket) -> None:
        """Read from a connected socket, and take ownership of it."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=source)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep the last 2048 bytes, and pause after too much output."""
        self.text = (self.text + data)[-2048:]
        self._received_bytes += len(data)
        if self._received_bytes > CONSOLE_BYTES_MAX and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(CONSOLE_PAUSE_SECONDS, self._resume_reading)

    def abort(self) -> None:
        """Close the connection immediately."""
        if self._transport is not None:
            self._transport.abort()

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


CONSOLE_BYTES_MAX = 64 * 1024
CONSOLE_PAUSE_SECONDS = 0.1
"""Interval between reads of the console, once it has written more than CONSOLE_BYTES_MAX."""
