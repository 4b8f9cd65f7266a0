"""Runs additional commands in a namespace sandbox, each on its own pty. Client of programs/namespace_exec.py."""

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from sandbox.interfaces.runtime import SANDBOX_UID, Command, ExitStatus, TerminalSize
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.primitives.concurrency import run_in_daemon_thread, wait_readable_shared
from sandbox.runtimes import sandbox_processes, seccomp_filter
from sandbox.runtimes.launcher_client import attempt_marker, create_memfd

_OPEN_SECONDS = 30.0
_RESIZE_SECONDS = 1.0
_REAP_SECONDS = 2.0
_POLL_SECONDS = 0.002
_CHUNK_BYTES = 64 * 1024
_OUTPUT_BUFFER_BYTES = 256 * 1024
_EXEC_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); import namespace_exec; namespace_exec.main(sys.argv[1:])"


class ExecTerminal:
    """An additional command in a sandbox. Implements `Terminal`."""

    def __init__(
        self, process: "ExecProcess", terminal_fd: int, command_pidfd: int, was_oom_killed: Callable[[], bool]
    ) -> None:
        self._process = process
        self._pty = PtyMaster(terminal_fd)
        self._command_pidfd = command_pidfd
        self._was_oom_killed = was_oom_killed
        # Start waiting immediately: the sandbox's init cannot end before the ended processes in the sandbox are reaped.
        self._exit_task = asyncio.create_task(self._wait_for_exit())

    @property
    def output(self) -> asyncio.StreamReader:
        """The terminal's output."""
        return self._pty.output

    @property
    def has_ended(self) -> bool:
        """Whether the command's process has ended."""
        return self._exit_task.done()

    async def write(self, data: bytes) -> None:
        """Write to the terminal's input."""
        await self._pty.write(data)

    async def resize(self, size: TerminalSize) -> None:
        """Change the terminal's size."""
        await self._pty.resize(size)

    async def hang_up(self) -> None:
        """Close the master side of the pty."""
        self._pty.close()

    async def wait(self) -> ExitStatus:
        """Return the command's exit status."""
        return await asyncio.shield(self._exit_task)

    async def _wait_for_exit(self) -> ExitStatus:
        """Return the status that the exec process reports.

        If that process was killed, reap the command's process here.
        """
        status = await self._process.read_status()
        await self._process.wait()
        await wait_readable_shared(self._command_pidfd)
        _reap(self._command_pidfd)
        kind, _, number = status.partition(b" ")
        code = int(number) if kind == b"exit" else None
        return ExitStatus(code, was_oom_killed=code != 0 and self._was_oom_killed())


def _reap(pidfd: int) -> None:
    """Reap an ended process if this process has adopted it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


class PtyMaster(asyncio.ReadTransport):
    """The master side of a pty. Takes ownership of the descriptor that it reads and writes.

    Output that the reader does not consume stays in the terminal's buffer.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        os.set_blocking(descriptor, False)
        self.output = asyncio.StreamReader(limit=_OUTPUT_BUFFER_BYTES)
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._write_lock = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._requested_size: TerminalSize | None = None
        self._resizing: asyncio.Task[None] | None = None
        self.output.set_transport(self)
        self.resume_reading()

    def is_reading(self) -> bool:
        """Return whether the descriptor is open. Returns True even while reading is paused."""
        return self._descriptor >= 0

    def pause_reading(self) -> None:
        """Stop reading. The StreamReader calls this when its buffer is full."""
        self._loop.remove_reader(self._descriptor)

    def resume_reading(self) -> None:
        """Resume reading. The StreamReader calls this when its buffer has space."""
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._read)

    async def write(self, data: bytes) -> None:
        """Write all data; wait while no program reads the input. Does nothing if the master is closed."""
        async with self._write_lock:
            while data and self._descriptor >= 0:
                try:
                    data = data[os.write(self._descriptor, data[:_CHUNK_BYTES]) :]
                except BlockingIOError:
                    await self._wait_writable()
                except OSError:
                    return

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of the terminal. The kernel then sends a signal to the terminal's foreground processes.

        A thread sets the size, because a program that reads the size holds a lock until it has had enough CPU time.
        Wait no longer than _RESIZE_SECONDS for the thread. Once the thread is done, the latest size requested in the
        meantime is set.
        """
        self._requested_size = size
        if self._resizing is None or self._resizing.done():
            self._resizing = asyncio.create_task(self._set_requested_size())
        await asyncio.wait({self._resizing}, timeout=_RESIZE_SECONDS)

    async def _set_requested_size(self) -> None:
        with suppress(OSError):
            while self._requested_size is not None and self._descriptor >= 0:
                descriptor, size = os.dup(self._descriptor), self._requested_size
                self._requested_size = None
                try:
                    await run_in_daemon_thread(partial(_set_size, descriptor, size))
                except OSError:  # no thread can be started
                    os.close(descriptor)
                    raise

    def close(self) -> None:
        """Close the master, which hangs up processes on the slave side. Idempotent.

        A thread closes the descriptor: the kernel waits until all threads that are reading or writing the slave have
        left the terminal's code. If their sandbox has too little CPU time, this takes a long time.
        """
        if self._descriptor < 0:
            return
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._set_writable()
        threading.Thread(target=os.close, args=[self._descriptor], name="hang-up", daemon=True).start()
        self._descriptor = -1
        self.output.feed_eof()

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: no process has the slave open
            chunk = b""
        if chunk:
            self.output.feed_data(chunk)
        else:
            self.close()

    async def _wait_writable(self) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(self._descriptor, self._set_writable)
        try:
            await self._writable
        finally:
            if self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)

    def _set_writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


def _set_size(descriptor: int, size: TerminalSize) -> None:
    """Set the size of the terminal, and close the descriptor."""
    with suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))
    os.close(descriptor)


class ExecProcess:
    """One process that runs programs/namespace_exec.py or programs/runsc_exec.py."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self.control = control
        self._pidfd = os.pidfd_open(process.pid)

    async def wait_opened(self) -> tuple[int, int]:
        """Return the pty's master and the command's pidfd. Raises AttemptError (sandbox_lost), even on timeout."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await wait_readable_shared(self.control.fileno())
        except TimeoutError:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The terminal was not ready in time; try again.") from None
        message, descriptors, _, _ = socket.recv_fds(self.control, 4096, 4)
        if message != b"open":
            reason = (
                message.removeprefix(b"error ").decode(errors="replace")
                or "the helper process exited without an error message"
            )
            raise AttemptError(
                FailureCode.SANDBOX_LOST, f"The sandbox could not be entered: {reason}. The sandbox may have ended."
            )
        return descriptors[0], descriptors[1]

    async def read_status(self) -> bytes:
        """Return the final status message; empty if the process was killed before it sent this message."""
        await wait_readable_shared(self.control.fileno())
        with suppress(ConnectionError):
            return self.control.recv(4096)
        return b""

    async def wait(self) -> None:
        """Wait for the process to end, reap it and close its descriptors."""
        await wait_readable_shared(self._pidfd)
        self._process.wait()
        self.control.close()
        os.close(self._pidfd)

    async def kill(self) -> None:
        """Kill an exec process that has not reported its command. The command is killed with it and reaped here."""
        self._process.kill()
        await self.wait()
        deadline = asyncio.get_running_loop().time() + _REAP_SECONDS
        while not sandbox_processes.reap_exec_children():
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(_POLL_SECONDS)


async def start_exec(
    attempt_id: str, init_pidfd: int, add_to_group: Callable[[int], None], command: Command, size: TerminalSize
) -> tuple[ExecProcess, int, int]:
    """Start `command` in a namespace sandbox. Results and errors: see `start_on_pty`."""
    return await start_on_pty(
        lambda: start_program(_EXEC_PROGRAM, attempt_id, SANDBOX_UID, size.rows, size.columns, command.directory),
        add_to_group,
        lambda control: _send_command(control, init_pidfd, command),
    )


async def start_on_pty(
    start: Callable[[], tuple[subprocess.Popen[bytes], socket.socket]],
    add_to_group: Callable[[int], None],
    send_command: Callable[[socket.socket], None],
) -> tuple[ExecProcess, int, int]:
    """Start a command in a sandbox. Returns the exec process, the pty's master and the command's pidfd.

    start: starts the exec process and returns it with its control socket. add_to_group: adds the exec process to the
    sandbox's control group, before that process starts anything. send_command: sends the command to the exec process,
    which then enters the sandbox. All three may raise OSError. Raises AttemptError (sandbox_lost).
    """
    try:
        exec_process = ExecProcess(*start())
    except OSError as error:
        raise AttemptError(
            FailureCode.SANDBOX_LOST, f"The terminal's process could not be started: {error}; try again."
        ) from error
    try:
        await asyncio.to_thread(add_to_group, exec_process.pid)
        send_command(exec_process.control)
        return exec_process, *await exec_process.wait_opened()
    except BaseException as error:
        await exec_process.kill()
        if isinstance(error, OSError):
            reason = f"The sandbox could not be entered: {error}. The sandbox may have ended."
            raise AttemptError(FailureCode.SANDBOX_LOST, reason) from error
        raise


def _send_command(control: socket.socket, init_pidfd: int, command: Command) -> None:
    variables = {"PWD": command.directory, **command.environment}
    files = [
        create_memfd("argv", _join_nul(command.argv)),
        create_memfd("environment", _join_nul([f"{name}={value}" for name, value in variables.items()])),
        create_memfd("filter", seccomp_filter.assemble_filter(os.uname().machine)),
    ]
    try:
        socket.send_fds(control, [b"join"], [init_pidfd, *files])
    finally:
        for file in files:
            os.close(file)


def start_program(
    program: str, attempt_id: str, *arguments: int | str
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a program from programs/. The number of its control socket and this process's pid precede `arguments`.

    The program dies with the calling thread. Raises OSError.
    """
    control, child_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = map(str, (Path(__file__).parent / "programs", child_control.fileno(), os.getpid(), *arguments))
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-c", program, *words, attempt_marker(attempt_id)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[child_control.fileno()],
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        control.close()
        raise
    finally:
        child_control.close()
    return process, control


def _join_nul(items: Sequence[str]) -> bytes:
    if any("\0" in word for word in items):
        raise AttemptError(FailureCode.SANDBOX_LOST, "Arguments and variables cannot contain NUL characters.")
    return "".join(f"{word}\0" for word in items).encode(errors="surrogateescape")
