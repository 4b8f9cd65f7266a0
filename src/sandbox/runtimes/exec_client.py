"""The runner's side of the joiner: a further command in a sandbox of namespaces, on a terminal of its own."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.layout import SANDBOX_UID
from sandbox.interfaces.runtime import Command, ExitStatus, TerminalSize
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import processes
from sandbox.runtimes.launcher_client import attempt_marker, create_memfd, wait_readable
from sandbox.runtimes.limits import seccomp
from sandbox.runtimes.pty import PtyMaster

_OPEN_SECONDS = 30.0
_REAP_SECONDS = 2.0
_POLL_SECONDS = 0.002
_EXEC_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); import exec_command; exec_command.main(sys.argv[1:])"


class ExecTerminal:
    """A command that joined a sandbox; the contract's `Terminal`."""

    def __init__(
        self, process: "ExecProcess", terminal_fd: int, command_pidfd: int, is_out_of_memory: Callable[[], bool]
    ) -> None:
        self._process = process
        self._pty = PtyMaster(terminal_fd)
        self._command_pidfd = command_pidfd
        self._is_out_of_memory = is_out_of_memory
        # At once: what has ended inside must be collected, or the sandbox's first process could not end.
        self._exit_task = asyncio.create_task(self._wait_for_exit())

    @property
    def output(self) -> asyncio.StreamReader:
        """What it shows."""
        return self._pty.output

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self._exit_task.done()

    async def write(self, data: bytes) -> None:
        """Type."""
        await self._pty.write(data)

    async def resize(self, size: TerminalSize) -> None:
        """Tell it a new size."""
        self._pty.resize(size)

    async def hang_up(self) -> None:
        """Close the outer end."""
        self._pty.close()

    async def wait(self) -> ExitStatus:
        """How the command ended."""
        return await asyncio.shield(self._exit_task)

    async def _wait_for_exit(self) -> ExitStatus:
        """The joiner tells; where it was killed itself, what is left of the command is this process's to collect."""
        status = await self._process.read_status()
        await self._process.wait()
        await wait_readable(self._command_pidfd)
        _reap(self._command_pidfd)
        kind, _, number = status.partition(b" ")
        code = int(number) if kind == b"exit" else None
        return ExitStatus(code, was_oom_killed=code != 0 and self._is_out_of_memory())


def _reap(pidfd: int) -> None:
    """Collect an ended process if this one has adopted it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


class ExecProcess:
    """One joiner process."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._control = control
        self._pidfd = os.pidfd_open(process.pid)

    def send_command(self, init_pidfd: int, command: Command) -> None:
        """Have it join. Raises OSError when it is gone."""
        variables = {"PWD": command.directory, **command.environment}
        files = [
            create_memfd("argv", _join_nul(command.argv)),
            create_memfd("environment", _join_nul([f"{name}={value}" for name, value in variables.items()])),
            create_memfd("filter", seccomp.assemble_filter(os.uname().machine)),
        ]
        try:
            socket.send_fds(self._control, [b"join"], [init_pidfd, *files])
        finally:
            for file in files:
                os.close(file)

    async def wait_opened(self) -> tuple[int, int]:
        """The outer end of the terminal and the command's process. Raises AttemptError (sandbox_lost), within 30 s."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await wait_readable(self._control.fileno())
        except TimeoutError:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The terminal was not there in time; try again.") from None
        message, descriptors, _, _ = socket.recv_fds(self._control, 4096, 4)
        if message != b"open":
            reason = message.removeprefix(b"error ").decode(errors="replace") or "it ended without a word"
            raise AttemptError(FailureCode.SANDBOX_LOST, f"The sandbox could not be entered: {reason}; it may be over.")
        return descriptors[0], descriptors[1]

    async def read_status(self) -> bytes:
        """Its last word; empty when it was killed before."""
        await wait_readable(self._control.fileno())
        with suppress(ConnectionError):
            return self._control.recv(4096)
        return b""

    async def wait(self) -> None:
        """Wait for its end, collect it and let go of it."""
        await wait_readable(self._pidfd)
        self._process.wait()
        self._control.close()
        os.close(self._pidfd)

    async def kill(self) -> None:
        """End it before it has handed over what it started. That ends with it and is then this process's to collect."""
        self._process.kill()
        await self.wait()
        deadline = asyncio.get_running_loop().time() + _REAP_SECONDS
        while not processes.reap_exec_children():
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(_POLL_SECONDS)


async def start_exec(
    attempt_id: str, init_pidfd: int, add_to_group: Callable[[int], None], command: Command, size: TerminalSize
) -> tuple[ExecProcess, int, int]:
    """Start `command` inside; gives its joiner, the outer end of its terminal and a descriptor of its process.

    The joiner is put into the sandbox's control group before it starts anything. Raises AttemptError (sandbox_lost).
    """
    try:
        joiner = _start_exec_process(attempt_id, command.directory, size)
    except OSError as error:
        raise AttemptError(FailureCode.SANDBOX_LOST, f"No process could be started: {error}; try again.") from error
    try:
        await asyncio.to_thread(add_to_group, joiner.pid)
        joiner.send_command(init_pidfd, command)
        return joiner, *await joiner.wait_opened()
    except BaseException as error:
        await joiner.kill()
        if isinstance(error, OSError):
            reason = f"The sandbox could not be entered: {error}; it may be over."
            raise AttemptError(FailureCode.SANDBOX_LOST, reason) from error
        raise


def _start_exec_process(attempt_id: str, directory: str, size: TerminalSize) -> ExecProcess:
    return ExecProcess(*start_program(_EXEC_PROGRAM, attempt_id, SANDBOX_UID, size.rows, size.columns, directory))


def start_program(
    program: str, attempt_id: str, *arguments: int | str
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a program of this folder: the number of its control socket and this process's id go before `arguments`.

    It dies with the thread that calls this. Raises OSError.
    """
    control, control_inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = map(str, (Path(__file__).parent / "programs", control_inside.fileno(), os.getpid(), *arguments))
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", "-c", program, *words, attempt_marker(attempt_id)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[control_inside.fileno()],
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        control.close()
        raise
    finally:
        control_inside.close()
    return process, control


def _join_nul(items: Sequence[str]) -> bytes:
    if any("\0" in word for word in items):
        raise AttemptError(FailureCode.SANDBOX_LOST, "A NUL character cannot be in an argument or the environment.")
    return "".join(f"{word}\0" for word in items).encode(errors="surrogateescape")
