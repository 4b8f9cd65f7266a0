"""The runner's side of the joiner: a further command in a sandbox of namespaces, on a terminal of its own."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.layout import UID
from sandbox.interfaces.runtime import Command, Exit, TerminalSize
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import processes
from sandbox.runtimes.launcher_client import mark_attempt, wait_readable, write_memory
from sandbox.runtimes.limits import seccomp
from sandbox.runtimes.pty import TerminalEnd

_OPEN_SECONDS = 30.0
_COLLECT_SECONDS = 2.0
_POLL_SECONDS = 0.002
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); import exec_command; exec_command.main(sys.argv[1:])"


class JoinedTerminal:
    """A command that joined a sandbox; the contract's `Terminal`."""

    def __init__(
        self, joiner: "Joiner", terminal_fd: int, command_fd: int, is_out_of_memory: Callable[[], bool]
    ) -> None:
        self._joiner = joiner
        self._end = TerminalEnd(terminal_fd)
        self._command_fd = command_fd
        self._is_out_of_memory = is_out_of_memory
        # At once: what has ended inside must be collected, or the sandbox's first process could not end.
        self._exit = asyncio.create_task(self._await_end())

    @property
    def output(self) -> asyncio.StreamReader:
        """What it shows."""
        return self._end.output

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self._exit.done()

    async def write(self, data: bytes) -> None:
        """Type."""
        await self._end.write(data)

    async def resize(self, size: TerminalSize) -> None:
        """Tell it a new size."""
        self._end.resize(size)

    async def hang_up(self) -> None:
        """Close the outer end."""
        self._end.close()

    async def wait(self) -> Exit:
        """How the command ended."""
        return await asyncio.shield(self._exit)

    async def _await_end(self) -> Exit:
        """The joiner tells; where it was killed itself, what is left of the command is this process's to collect."""
        told = await self._joiner.read()
        await self._joiner.ended()
        await wait_readable(self._command_fd)
        _collect(self._command_fd)
        kind, _, number = told.partition(b" ")
        code = int(number) if kind == b"exit" else None
        return Exit(code, out_of_memory=code != 0 and self._is_out_of_memory())


def _collect(process_fd: int) -> None:
    """Collect an ended process if this one has adopted it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, process_fd, os.WEXITED | os.WNOHANG)
    os.close(process_fd)


class Joiner:
    """One joiner process."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self.pid = process.pid
        self._process = process
        self._control = control
        self._descriptor = os.pidfd_open(process.pid)

    def send(self, first_process_fd: int, command: Command) -> None:
        """Have it join. Raises OSError when it is gone."""
        variables = {"PWD": command.directory, **command.environment}
        files = [
            write_memory("argv", _listed(command.argv)),
            write_memory("environment", _listed([f"{name}={value}" for name, value in variables.items()])),
            write_memory("filter", seccomp.assemble_filter(os.uname().machine)),
        ]
        try:
            socket.send_fds(self._control, [b"join"], [first_process_fd, *files])
        finally:
            for file in files:
                os.close(file)

    async def opened(self) -> tuple[int, int]:
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

    async def read(self) -> bytes:
        """Its last word; empty when it was killed before."""
        await wait_readable(self._control.fileno())
        with suppress(ConnectionError):
            return self._control.recv(4096)
        return b""

    async def ended(self) -> None:
        """Wait for its end, collect it and let go of it."""
        await wait_readable(self._descriptor)
        self._process.wait()
        self._control.close()
        os.close(self._descriptor)

    async def end(self) -> None:
        """End it before it has handed over what it started. That ends with it and is then this process's to collect."""
        self._process.kill()
        await self.ended()
        deadline = asyncio.get_running_loop().time() + _COLLECT_SECONDS
        while not processes.reap_joined():
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(_POLL_SECONDS)


async def join(
    attempt_id: str, first_process_fd: int, add_to_group: Callable[[int], None], command: Command, size: TerminalSize
) -> tuple[Joiner, int, int]:
    """Start `command` inside; gives its joiner, the outer end of its terminal and a descriptor of its process.

    The joiner is put into the sandbox's control group before it starts anything. Raises AttemptError (sandbox_lost).
    """
    try:
        joiner = _start(attempt_id, command.directory, size)
    except OSError as error:
        raise AttemptError(FailureCode.SANDBOX_LOST, f"No process could be started: {error}; try again.") from error
    try:
        await asyncio.to_thread(add_to_group, joiner.pid)
        joiner.send(first_process_fd, command)
        return joiner, *await joiner.opened()
    except BaseException as error:
        await joiner.end()
        if isinstance(error, OSError):
            reason = f"The sandbox could not be entered: {error}; it may be over."
            raise AttemptError(FailureCode.SANDBOX_LOST, reason) from error
        raise


def _start(attempt_id: str, directory: str, size: TerminalSize) -> Joiner:
    return Joiner(*start_program(_PROGRAM, attempt_id, UID, size.rows, size.columns, directory))


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
            [sys.executable, "-I", "-S", "-E", "-c", program, *words, mark_attempt(attempt_id)],
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


def _listed(words: Sequence[str]) -> bytes:
    if any("\0" in word for word in words):
        raise AttemptError(FailureCode.SANDBOX_LOST, "A NUL character cannot be in an argument or the environment.")
    return "".join(f"{word}\0" for word in words).encode(errors="surrogateescape")
