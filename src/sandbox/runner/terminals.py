"""Terminals of a sandbox: shells, and the agent's terminal, which has many viewers and one writer."""

import asyncio
import contextlib
import re
import time
from collections.abc import Container, Mapping

import msgspec

from sandbox.interfaces.runner import (
    FRAME_BYTES_MAX,
    ClientFrame,
    EndFrame,
    InputFrame,
    OpenTerminal,
    OutputFrame,
    ResizeFrame,
    RunnerFrame,
    TerminalRefusedError,
    WriteAccessFrame,
)
from sandbox.interfaces.runtime import Command, ExitStatus, Sandbox, Terminal, TerminalSize
from sandbox.interfaces.secrets import Redactor
from sandbox.model.failure import AttemptError
from sandbox.model.fixed_limits import (
    SHELL_OUTPUT_DRAIN_TIMEOUT_SECONDS,
    TERMINAL_BACKLOG_BYTES_MAX,
    TERMINAL_CLIENTS_MAX,
    TERMINAL_INPUT_TIMEOUT_SECONDS,
    TERMINAL_REPLAY_BYTES,
)
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.primitives.message_stream import encode_message, read_message
from sandbox.primitives.runner_cpu_throttle import CpuQueue
from sandbox.runner.agent_output import redacted_chunks

SHELL = ("/bin/bash",)
_START_SHELL = ("/bin/sh", "-c", f'cd -- "$0"; exec {SHELL[0]}')
"""Starts a shell in the directory that is the next argument, or in / if the agent has removed or locked the directory.

`sh`, unlike `bash`, does not read BASH_ENV, which the manifest may set.
"""

_ROOT_DIRECTORY = "/"
"""Directory in which the programs that open shells start: the only directory that an agent cannot remove or lock."""

_SIZE_MAX = 1000
_INPUT_BYTES = 4096
"""Size of the input that a terminal must accept in TERMINAL_INPUT_TIMEOUT_SECONDS: the kernel's terminal buffer."""

_SEQUENCE_BYTES_MAX = 4096
"""Maximum number of bytes in which the end of a cut escape sequence is searched for. Longer sequences are rare."""

_SEQUENCE_BOUNDARY = re.compile(rb"(?=\x1b)|(?<=\n)")
_CONTINUATION_BYTES = re.compile(rb"[\x80-\xbf]{0,3}")

_decoder: "msgspec.msgpack.Decoder[ClientFrame]" = msgspec.msgpack.Decoder(ClientFrame)


class _InputTimer:
    """Limits how long a client's input waits for the terminal to accept it. All frames share one limit.

    With a limit per frame, a client that has left would stay connected until the last of its frames times out.
    """

    def __init__(self) -> None:
        self._seconds_left = TERMINAL_INPUT_TIMEOUT_SECONDS
        self._ended_at = time.monotonic()

    async def write(self, terminal: Terminal, data: bytes) -> None:
        """Write the data; drop what the terminal does not accept within the time left.

        Idle time and accepted data replenish the time left.
        """
        begun_at = time.monotonic()
        seconds = min(self._seconds_left + begun_at - self._ended_at, TERMINAL_INPUT_TIMEOUT_SECONDS)
        accepted_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await terminal.write(data)
                accepted_bytes = len(data)
        self._ended_at = time.monotonic()
        seconds -= self._ended_at - begun_at
        self._seconds_left = max(seconds, 0) + accepted_bytes * TERMINAL_INPUT_TIMEOUT_SECONDS / _INPUT_BYTES


class TerminalClient:
    """A client of a terminal, connected through the control socket."""

    def __init__(self, request: OpenTerminal, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.size = TerminalSize(request.rows, request.columns)
        self.is_read_only = request.is_read_only
        self._reader = reader
        self._writer = writer
        self._input_timer = _InputTimer()

    def send(self, frame: RunnerFrame) -> None:
        """Send without waiting. A client whose backlog is too large is disconnected; it can reconnect."""
        if self._writer.is_closing():
            return
        self._writer.write(encode_message(frame))
        if self._writer.transport.get_write_buffer_size() > TERMINAL_BACKLOG_BYTES_MAX:
            self._writer.transport.abort()

    async def send_and_drain(self, frame: RunnerFrame) -> None:
        """Send the frame, then wait while the write buffer is too full."""
        self._writer.write(encode_message(frame))
        await self._writer.drain()

    async def serve(self, terminal: Terminal, may_write: "asyncio.Event") -> None:
        """Handle the client's frames until it disconnects."""
        with contextlib.suppress(OSError, ValueError):
            while (message := await read_message(self._reader, _decoder, FRAME_BYTES_MAX)) is not None:
                if isinstance(message, ResizeFrame):
                    size = (message.rows, message.columns)
                    self.size = TerminalSize(*(min(max(number, 1), _SIZE_MAX) for number in size))
                if may_write.is_set() and isinstance(message, ResizeFrame):
                    await terminal.resize(self.size)
                elif may_write.is_set() and isinstance(message, InputFrame):
                    await self._input_timer.write(terminal, message.data)


def _skip_partial_sequence(data: bytes) -> bytes:
    """Drop the beginning of cut-off output, up to the start of the next escape sequence or line.

    Otherwise, a terminal would print the rest of a cut sequence as text, such as `H`.
    """
    boundary = _SEQUENCE_BOUNDARY.search(data, 0, _SEQUENCE_BYTES_MAX) or _CONTINUATION_BYTES.match(data)
    return data[boundary.end() :] if boundary else data


class SharedTerminal:
    """The agent's terminal. Of the clients that are not read-only, only the first may type."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._clients: dict[TerminalClient, asyncio.Event] = {}
        self._replay = bytearray()
        self._is_replay_cut = False
        self._ended = asyncio.Event()

    @property
    def has_clients(self) -> bool:
        """Whether any client is connected."""
        return bool(self._clients)

    def broadcast(self, data: bytes) -> None:
        """Send data to all current viewers, and keep recent data for later ones."""
        self._replay += data
        excess = len(self._replay) - TERMINAL_REPLAY_BYTES
        if excess > 0:
            del self._replay[:excess]
            self._is_replay_cut = True
        for client in tuple(self._clients):
            client.send(OutputFrame(data))

    def close(self, exit_status: ExitStatus) -> None:
        """Send the end frame to all clients."""
        for client in tuple(self._clients):
            client.send(EndFrame(exit_status.code))
        self._ended.set()

    async def serve_client(self, client: TerminalClient) -> None:
        """Serve one client until it disconnects or the terminal closes."""
        may_write = self._clients[client] = asyncio.Event()
        try:
            await self._choose_writer()
            if not may_write.is_set():
                client.send(WriteAccessFrame(may_write=False))
            replay = bytes(self._replay)
            client.send(OutputFrame(_skip_partial_sequence(replay) if self._is_replay_cut else replay))
            await run_until_first_complete(client.serve(self._terminal, may_write), self._ended.wait())
        finally:
            del self._clients[client]
            await self._choose_writer()

    async def _choose_writer(self) -> None:
        if any(may_write.is_set() for may_write in self._clients.values()):
            return
        for client, may_write in self._clients.items():
            if not client.is_read_only:
                may_write.set()
                client.send(WriteAccessFrame(may_write=True))
                await self._terminal.resize(client.size)
                return


class SandboxTerminals(msgspec.Struct, frozen=True):
    """The terminals that clients can open in one sandbox.

    environment: the variables of shells, which start in `directory`.
    agent_terminal: the agent's terminal, to which the caller broadcasts the output; None if the agent has none.
    """

    sandbox: Sandbox
    environment: Mapping[str, str]
    directory: str
    agent_terminal: SharedTerminal | None = None

    async def open_shell(self, term: str, size: TerminalSize) -> Terminal:
        """Start a shell. Raises AttemptError."""
        argv = (*_START_SHELL, self.directory)
        command = Command(argv, {**self.environment, "TERM": term}, _ROOT_DIRECTORY)
        return await self.sandbox.open_terminal(command, size)


class TerminalServer:
    """Serves terminals to clients of the control socket between `enable` and `disable`; refuses clients otherwise.

    cpu_queue: the queue in which the output of shells waits for the runner's CPU budget.
    """

    def __init__(self, redactor: Redactor | None, cpu_queue: CpuQueue) -> None:
        self._redactor = redactor
        self._cpu_queue = cpu_queue
        self._terminals: SandboxTerminals | None = None
        self._is_closed = False
        self._connections: set[asyncio.Task[None]] = set()
        self._shell_clients: set[TerminalClient] = set()
        self._changed = asyncio.Event()

    @property
    def has_agent_clients(self) -> bool:
        """Whether the agent's terminal has clients. While it does, the hang timeout does not apply."""
        return self._agent_terminal is not None and self._agent_terminal.has_clients

    def close_agent_terminal(self, exit_status: ExitStatus) -> None:
        """Send the end frame to the clients of the agent's terminal."""
        if self._agent_terminal is not None:
            self._agent_terminal.close(exit_status)

    def enable(self, terminals: SandboxTerminals) -> None:
        """Allow clients to open these terminals. Does nothing after `disable`."""
        if not self._is_closed:
            self._terminals = terminals

    def disable(self) -> None:
        """Stop opening terminals. Open ones are closed when the sandbox ends."""
        self._is_closed = True

    def close_shells(self, message: str) -> None:
        """Stop opening terminals, and send the reason to the clients of shells."""
        self.disable()
        for client in tuple(self._shell_clients):
            client.send(EndFrame(message=message))

    async def wait_until_idle(self, seconds: float) -> None:
        """Return once no client has been connected for this long."""
        while True:
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._connections else seconds):
                    await self._changed.wait()
            except TimeoutError:
                return

    def check_can_open(self, request: OpenTerminal) -> None:
        """Raise TerminalRefusedError if the terminal cannot be opened."""
        if self._is_closed or self._terminals is None:
            raise TerminalRefusedError("The task's sandbox is not running; check the task's status.")
        if request.is_agent_terminal and self._agent_terminal is None:
            raise TerminalRefusedError("The task's agent has no terminal, because headless is true.")
        if len(self._connections) >= TERMINAL_CLIENTS_MAX:
            raise TerminalRefusedError(f"This task has {TERMINAL_CLIENTS_MAX} open terminals; close one.")

    async def serve(self, request: OpenTerminal, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client whose request was accepted, until it disconnects or its terminal ends."""
        serving = asyncio.create_task(self._serve(request, TerminalClient(request, reader, writer)))
        self._connections.add(serving)
        self._changed.set()
        try:
            # Do not await the task directly: `close_all` cancels the task but must not cancel its waiter.
            await asyncio.wait({serving})
        finally:
            serving.cancel()
            self._connections.discard(serving)
            self._changed.set()
        if not serving.cancelled():
            serving.result()

    async def close_all(self) -> None:
        """Disconnect all clients."""
        self.disable()
        connections = tuple(self._connections)
        for serving in connections:
            serving.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    @property
    def _agent_terminal(self) -> SharedTerminal | None:
        return None if self._terminals is None else self._terminals.agent_terminal

    async def _serve(self, request: OpenTerminal, client: TerminalClient) -> None:
        with contextlib.suppress(OSError):
            if request.is_agent_terminal and self._agent_terminal is not None:
                await self._agent_terminal.serve_client(client)
            elif self._terminals is not None and not self._is_closed:
                await self._serve_shell(self._terminals, request, client)

    async def _serve_shell(self, terminals: SandboxTerminals, request: OpenTerminal, client: TerminalClient) -> None:
        """Serve a new shell, which is hung up when the client disconnects."""
        try:
            terminal = await terminals.open_shell(request.term, client.size)
        except AttemptError as error:
            message = error.message if self._redactor is None else self._redactor.redact_text(error.message)
            await client.send_and_drain(EndFrame(message=message))
            return
        may_write = asyncio.Event()
        may_write.set()
        self._shell_clients.add(client)
        try:
            client.send(WriteAccessFrame(may_write=True))
            await run_until_first_complete(client.serve(terminal, may_write), self._forward_shell(terminal, client))
        finally:
            self._shell_clients.discard(client)
            await terminal.hang_up()

    async def _forward_shell(self, terminal: Terminal, client: TerminalClient) -> None:
        """Forward the shell's output, no faster than the client reads the output, and the shell's exit code."""
        forwarding = asyncio.create_task(self._forward_output(terminal, client))
        try:
            exit_status = await terminal.wait()
            await asyncio.wait({forwarding}, timeout=SHELL_OUTPUT_DRAIN_TIMEOUT_SECONDS)
        finally:
            forwarding.cancel()
            await asyncio.gather(forwarding, return_exceptions=True)
        await client.send_and_drain(EndFrame(exit_status.code))

    async def _forward_output(self, terminal: Terminal, client: TerminalClient) -> None:
        async for chunk in redacted_chunks(terminal.output, self._redactor, self._cpu_queue):
            await client.send_and_drain(OutputFrame(chunk))


def shell_environment(variables: Mapping[str, str], secrets: Container[str]) -> dict[str, str]:
    """Return the agent's variables for a shell, without secrets and model access."""
    return {name: text for name, text in variables.items() if name not in secrets}


PAUSE_COMMAND = Command(("/bin/sleep", "infinity"), {"PATH": "/usr/bin:/bin"}, _ROOT_DIRECTORY)
"""The command of a sandbox whose agent runs in a terminal, or that has no agent. It waits, so the sandbox stays."""
