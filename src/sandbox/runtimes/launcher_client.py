"""Client of programs/launcher.py: starts the launcher, waits until it is ready and sends it commands.

Passes memfds to the programs that the launcher starts, and reads their output without accepting descriptors that
programs pass.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import TRANSPARENT_PORTS, ConfinementLostError, Listeners
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import EPOLL_ENTRIES_MAX, KILL_TIMEOUT_SECONDS
from sandbox.primitives.concurrency import wait_readable_shared
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.limits.files_without_descriptors import (
    ClosingFilesMeter,
    PendingSyscallInterrupter,
    SyscallBufferMeter,
)
from sandbox.runtimes.limits.kernel_memory import SlabMeter, SlabStatistics
from sandbox.runtimes.limits.memory_mappings import MappingMeter
from sandbox.runtimes.limits.open_files import EpollCounter, count_machine_epoll_entries
from sandbox.runtimes.limits.socket_memory import PageFragmentMeter, SocketCounter, SocketMemoryMeter
from sandbox.runtimes.limits.usage_limits import KernelUsage
from sandbox.runtimes.programs import launcher


def create_memfd(name: str, content: bytes) -> int:
    """Create a memfd with this content, positioned at its start. The caller closes it."""
    descriptor = os.memfd_create(name)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


_BUFFER_BYTES = 256 * 1024


_SO_PASSRIGHTS = 83


def refuse_passed_descriptors(receiver: socket.socket) -> bool:
    """Make the kernel refuse to pass files (SCM_RIGHTS) to a Unix socket. Returns False before Linux 6.16.

    If the receiver does not accept the files, the kernel closes them in the thread that reads or closes the socket. A
    program inside could pass a connection that takes arbitrarily long to close (SO_LINGER).
    """
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


class _ClosingProtocol(asyncio.StreamReaderProtocol):
    """Closes its transport at the end of the stream, instead of keeping the write direction open."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def open_reader(source: socket.socket) -> tuple[asyncio.StreamReader, asyncio.Transport]:
    """Return a reader for the socket and the transport to abort it. Takes ownership of the socket.

    Urgent data (MSG_OOB) is read like other data. Otherwise, each urgent byte would wake this process up and be dropped
    without being counted.
    """
    source.shutdown(socket.SHUT_WR)
    source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if not refuse_passed_descriptors(source):
        source = _relay_in_thread(source)
    reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: _ClosingProtocol(reader), sock=source)
    return reader, transport


def _relay_in_thread(source: socket.socket) -> socket.socket:
    """Return a socket with the data of `source` and without files. Only a daemon thread reads and closes `source`."""
    reader, writer = socket.socketpair()

    def relay() -> None:
        with source, writer, suppress(OSError):
            while data := source.recv(_BUFFER_BYTES):
                writer.sendall(data)

    threading.Thread(target=relay, name="output", daemon=True).start()
    return reader


_READY_SECONDS = 30.0
_EXIT_SECONDS = 1.0
_DESCRIPTORS_MAX = 250
"""Maximum number of descriptors per message, below the kernel's limit (SCM_MAX_FD)."""
_FIXED_LISTENERS_COUNT = 4
"""Number of listeners other than the transparent ones. The socket of a `SocketCounter` may follow all listeners."""
_LAUNCHER_CODE = "import sys; sys.path.append(sys.argv.pop(1)); import launcher; launcher.main(sys.argv[1:])"
"""Imports the launcher instead of running its file, because Python caches bytecode only for imported modules."""


def attempt_marker(attempt_id: str) -> str:
    """Return the argument that identifies a sandbox's processes on machines without control groups."""
    return f"sandbox:{attempt_id}"


class LauncherProcess:
    """A launcher process. It is replaced by the sandbox's program on exec. Create it while an event loop is running.

    epoll_counter, thread_interrupters: set once the launcher is ready. slab_statistics: shared by the meters of all
        launchers of this process.
    """

    epoll_counter: EpollCounter
    thread_interrupters: Sequence[PendingSyscallInterrupter]
    slab_statistics = SlabStatistics()

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        stdout: socket.socket,
        stderr: socket.socket,
        transparent_ports: Sequence[int],
    ) -> None:
        self.pid = process.pid
        self.stdout = stdout
        self.stderr = stderr
        # Reading the slab statistics takes several milliseconds, so a thread does it while the launcher starts up.
        self._counters = asyncio.get_running_loop().run_in_executor(None, _create_counters)
        self._socket_counter: SocketCounter | None = None
        """Counts the sockets of the sandbox's network. Set once the launcher is ready."""
        self._slab_meter = SlabMeter(self.slab_statistics.measure_usage)
        self._mapping_meter = MappingMeter()
        self._page_fragment_meter = PageFragmentMeter()
        self._process = process
        self._control = control
        self._transparent_ports = transparent_ports
        self._pidfd = os.pidfd_open(process.pid)

    async def wait_ready(self) -> Listeners:
        """Wait up to 30 s until the launcher has opened its listeners and is confined. Returns the listeners.

        Raises AttemptError (provision_failed) with the launcher's reason, or (sandbox_lost) if the launcher was killed.
        """
        sockets: list[socket.socket] = []
        try:
            async with asyncio.timeout(_READY_SECONDS):
                sockets = await self._receive(b"sockets")
                await self._receive(b"ready")
                self.epoll_counter, self.thread_interrupters = await self._counters
        except BaseException as error:
            for each in sockets:
                each.close()
            if isinstance(error, TimeoutError):
                raise AttemptError(FailureCode.PROVISION_FAILED, "The sandbox was not ready in time.") from None
            raise
        return self._build_listeners(sockets)

    async def _receive(self, expected: bytes) -> list[socket.socket]:
        await wait_readable_shared(self._control.fileno())
        message, descriptors, _, _ = socket.recv_fds(self._control, 4096, _DESCRIPTORS_MAX)
        if message == expected:
            return [socket.socket(fileno=descriptor) for descriptor in descriptors]
        await self.raise_if_killed()
        reason = (
            message.removeprefix(b"error ") or self._read_stderr() or b"the launcher ended without an error message"
        )
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"The sandbox could not be created: {reason.decode(errors='replace')}. Run 'sandbox doctor' for help.",
        )

    def exec_program(self, argv: Sequence[str], stdin: bytes, descriptors: Sequence[int]) -> None:
        """Make the launcher exec `argv`: the path, then the arguments starting with argv[0].

        `descriptors` are numbered from FIRST_HIGH_DESCRIPTOR. Raises OSError.
        """
        words = _write_argv(argv)
        stdin_file = create_memfd("stdin", stdin)
        try:
            socket.send_fds(self._control, [b"start"], [words, stdin_file, *descriptors])
        finally:
            os.close(words)
            os.close(stdin_file)

    def kernel_usage(
        self,
        group: ControlGroup,
        memory_bytes: int,
        syscall_buffer_meter: SyscallBufferMeter | None = None,
        closing_files_meter: ClosingFilesMeter | None = None,
    ) -> KernelUsage:
        """Return the kernel usage of a control group and of the launcher's network namespace.

        memory_bytes: the limit that the group was created with. syscall_buffer_meter, closing_files_meter: None if
        the programs have their own kernel. Cheap enough to call ten times a second, in a thread.
        """
        return group.kernel_usage(
            self.pid,
            memory_bytes,
            SocketMemoryMeter(self._socket_counter, self._page_fragment_meter),
            self._slab_meter,
            self._mapping_meter,
            syscall_buffer_meter,
            closing_files_meter,
        )

    def is_slab_reading_due(self) -> bool:
        """Return whether a second has passed since `kernel_usage` read the machine's slabs."""
        return self._slab_meter.is_due()

    async def run_command(self, argv: Sequence[str], low_fds: Sequence[int], descriptors: Sequence[int]) -> int:
        """Make the launcher start `argv` as a child, and return its exit status.

        low_fds: the program's descriptors from 0, starting with the three standard ones. `descriptors` are numbered
        as in `exec_program`.

        On cancellation, the program is killed. CancelledError propagates once the program has ended, at the
        latest after KILL_TIMEOUT_SECONDS. Raises OSError, ConfinementLostError.
        """
        status, status_inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = _write_argv(argv)
        with status:
            try:
                with status_inside:
                    passed = [status_inside.fileno(), words, *low_fds, *descriptors]
                    socket.send_fds(self._control, [b"run %d" % len(low_fds)], passed)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ConfinementLostError("the confinement was killed from outside") from error
            finally:
                os.close(words)
            try:
                await wait_readable_shared(status.fileno())
            except asyncio.CancelledError:
                status.shutdown(socket.SHUT_WR)
                with suppress(TimeoutError):
                    await asyncio.wait_for(wait_readable_shared(status.fileno()), KILL_TIMEOUT_SECONDS)
                raise
            code = status.recv(16)
        if not code:
            raise ConfinementLostError("the confined program was killed from outside")
        return int(code)

    async def raise_if_killed(self) -> None:
        """Raise AttemptError (sandbox_lost) if a signal ended the process.

        Call this after the process has closed its descriptors, when it has ended or will end soon.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), _EXIT_SECONDS)
        if self.exit_code is not None and self.exit_code < 0:
            raise AttemptError(
                FailureCode.SANDBOX_LOST, f"The sandbox was killed by signal {-self.exit_code} while it started."
            )

    @property
    def exit_code(self) -> int | None:
        """The exit status, -n after signal n; None until `wait` has returned."""
        return self._process.returncode

    def kill(self) -> None:
        """Send SIGKILL to the process."""
        self._process.kill()

    async def wait(self) -> None:
        """Wait for the process to end and reap it."""
        if self._process.returncode is None:
            await wait_readable_shared(self._pidfd)
            self._process.wait()

    async def end(self) -> None:
        """Kill and reap the process, and close the runner's descriptors."""
        self.kill()
        await self.wait()
        self.close()

    def close(self) -> None:
        """Close the runner's descriptors after the process has ended."""
        for one in (self._control, self.stdout, self.stderr):
            one.close()
        if self._socket_counter is not None:
            self._socket_counter.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _build_listeners(self, sockets: list[socket.socket]) -> Listeners:
        counters = sockets[_FIXED_LISTENERS_COUNT + len(self._transparent_ports) :]
        listeners = sockets[: len(sockets) - len(counters)]
        for one in listeners:
            one.setblocking(False)
        model, proxy, dns_udp, dns_tcp, *transparent = listeners
        self._socket_counter = SocketCounter(counters[0]) if counters else None
        by_port = dict(zip(self._transparent_ports, transparent, strict=True))
        return Listeners(model, proxy, dns_udp, dns_tcp, by_port)

    def _read_stderr(self) -> bytes:
        self.stderr.setblocking(False)
        with suppress(BlockingIOError):
            return self.stderr.recv(4096).strip()
        return b""


def _create_counters() -> tuple[EpollCounter, Sequence[PendingSyscallInterrupter]]:
    """Count kernel objects of the whole machine before the first program of the sandbox starts."""
    entries = count_machine_epoll_entries()
    return EpollCounter(initial_count=entries), (
        PendingSyscallInterrupter(),
        PendingSyscallInterrupter(count_machine_epoll_entries, EPOLL_ENTRIES_MAX, initial_count=entries),
    )


def start_launcher(
    attempt_id: str,
    kernel_uid: int | None,
    paths: Mapping[str, Path],
    *,
    files_uid: int | None = None,
    entries: Iterable[tuple[str, str, str]] = (),
    seccomp_filter: bytes = b"",
    transparent_ports: Sequence[int] = TRANSPARENT_PORTS,
) -> LauncherProcess:
    """Start a launcher. The launcher and the sandbox die with the calling thread. Raises OSError.

    paths: host paths, keyed by their names under EXPOSED_DIRECTORY. files_uid: kernel uid that uid 1000 inside is
    mapped to, for sandboxes with their own user namespace. entries: additional entries to expose; see
    `launcher.expose_entries`.
    seccomp_filter: system call filter for a process that makes the system calls of all programs inside. If it is given,
    open files are not limited.
    """
    control, child_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stdout, stdout_inside = socket.socketpair()
    stderr, stderr_inside = socket.socketpair()
    for one in (stdout, stderr):
        refuse_passed_descriptors(one)
    uids = ["-" if uid is None else str(uid) for uid in (kernel_uid, files_uid)]
    filters = [create_memfd("filter", seccomp_filter)] if seccomp_filter else []
    options = (*uids, *(map(str, filters) if filters else "-"), ",".join(map(str, transparent_ports)))
    arguments = (
        child_control.fileno(),
        os.getpid(),
        *options,
        *_entry_arguments(paths, entries),
        attempt_marker(attempt_id),
    )
    with ExitStack() as child_files:
        for one in (child_control, stdout_inside, stderr_inside):
            child_files.callback(one.close)
        for descriptor in filters:
            child_files.callback(os.close, descriptor)
        try:
            process = _spawn(arguments, stdout_inside, stderr_inside, [child_control.fileno(), *filters])
        except OSError:
            for one in (control, stdout, stderr):
                one.close()
            raise
    return LauncherProcess(process, control, stdout, stderr, transparent_ports)


def _spawn(
    arguments: Iterable[object], stdout: socket.socket, stderr: socket.socket, inherited: Sequence[int]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            "-E",
            "-c",
            _LAUNCHER_CODE,
            *map(str, (Path(__file__).parent / "programs", *arguments)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=stdout.fileno(),
        stderr=stderr.fileno(),
        pass_fds=inherited,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        start_new_session=True,
    )


def _entry_arguments(paths: Mapping[str, Path], entries: Iterable[tuple[str, str, str]]) -> list[str]:
    binds = (("bind", name, str(path)) for name, path in paths.items())
    return [word for entry in (*binds, *entries) for word in entry]


def _write_argv(argv: Sequence[str]) -> int:
    return create_memfd("argv", "\0".join(argv).encode(errors="surrogateescape"))


class ProgramSpec(msgspec.Struct):
    """An argv, and the descriptors that the launcher passes to it."""

    argv: list[str] = []
    descriptors: list[int] = []

    def add_descriptor(self, descriptor: int) -> str:
        """Take ownership of a descriptor. Returns its number in the launched program."""
        self.descriptors.append(descriptor)
        return str(launcher.FIRST_HIGH_DESCRIPTOR + len(self.descriptors) - 1)

    def close(self) -> None:
        """Close the descriptors after they were sent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def reject_nul(strings: Iterable[str]) -> None:
    """Raise AttemptError (provision_failed) for arguments with NUL characters, which the kernel would truncate."""
    if any("\0" in word for word in strings):
        raise AttemptError(FailureCode.PROVISION_FAILED, "Arguments and variables cannot contain NUL characters.")
