"""The agent's terminal behind a runner's control socket: one client types, all watch, and no client blocks another."""

import asyncio
import gc
from contextlib import asynccontextmanager

import pytest

from sandbox.interfaces.runner import (
    EndFrame,
    InputFrame,
    OpenTerminal,
    OutputFrame,
    Reply,
    ResizeFrame,
    TerminalRefusedError,
    WriteAccessFrame,
)
from sandbox.interfaces.runtime import ExitStatus, TerminalSize
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import TERMINAL_CLIENTS_MAX, TERMINAL_REPLAY_BYTES
from sandbox.placements.runner_client import LocalRunnerClient
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner import terminals as terminals_module
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.terminals import SandboxTerminals, SharedTerminal, TerminalServer
from sandbox.secrets.redaction.redactor import SecretRedactor

AGENT_TERMINAL = OpenTerminal(30, 100, is_agent_terminal=True)
READ_ONLY_TERMINAL = OpenTerminal(30, 100, is_agent_terminal=True, is_read_only=True)


class RecordingTerminal:
    """A terminal that records input and sizes."""

    def __init__(self):
        self.typed, self.sizes, self.changed = b"", [], asyncio.Event()

    async def write(self, data):
        self.typed += data
        self.changed.set()

    async def resize(self, size):
        self.sizes.append(size)
        self.changed.set()

    async def wait_until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def serve_terminal(tmp_path, *, is_headless=False, redactor=None):
    """Serve a recording terminal; yield the server, the terminal and a function that connects another client."""
    terminals, terminal = TerminalServer(redactor, CpuThrottle().queue()), RecordingTerminal()
    terminal.shared = SharedTerminal(terminal)
    terminals.enable(SandboxTerminals(object(), {}, "/", None if is_headless else terminal.shared))
    client, connections = LocalRunnerClient(tmp_path / "abcdefghijkl.sock"), []

    async def connect(request=AGENT_TERMINAL):
        connections.append(await client.open_terminal(request))
        return connections[-1]

    async with serve_control_socket(tmp_path / "abcdefghijkl.sock", lambda _: Reply(done=True), terminals):
        yield terminals, terminal, connect
        for connection in connections:
            await connection.close()
        async with asyncio.timeout(10):
            await terminals.wait_until_idle(0.01)


async def read_frame(connection):
    async with asyncio.timeout(10):
        return await connection.read()


async def test_first_client_has_write_access_until_it_disconnects(tmp_path):
    async with serve_terminal(tmp_path) as (terminals, terminal, connect):
        first = await connect()
        assert [await read_frame(first) for _ in range(2)] == [WriteAccessFrame(may_write=True), OutputFrame(b"")]
        watcher = await connect(READ_ONLY_TERMINAL)
        second = await connect(OpenTerminal(40, 120, is_agent_terminal=True))
        for connection in (watcher, second):
            assert [await read_frame(connection) for _ in range(2)] == [
                WriteAccessFrame(may_write=False),
                OutputFrame(b""),
            ]
        await second.send(InputFrame(b"not mine"))
        await second.send(ResizeFrame(11, 22))
        await first.send(InputFrame(b"mine"))
        await terminal.wait_until(lambda: terminal.typed == b"mine")
        await first.close()
        assert await read_frame(second) == WriteAccessFrame(may_write=True)
        await second.send(InputFrame(b" now"))
        await terminal.wait_until(lambda: terminal.typed == b"mine now")
        assert terminal.sizes == [TerminalSize(30, 100), TerminalSize(11, 22)]
        assert terminals.has_agent_clients


async def test_client_with_unread_input_can_disconnect(tmp_path, monkeypatch):
    """A client that could not disconnect would keep its write access, so no one else could type."""
    monkeypatch.setattr(terminals_module, "TERMINAL_INPUT_TIMEOUT_SECONDS", 0.1)
    async with serve_terminal(tmp_path) as (terminals, terminal, connect):
        started = asyncio.Event()

        async def block(_):
            started.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(terminal, "write", block)
        first, second = await connect(), await connect()
        assert [await read_frame(second) for _ in range(2)] == [WriteAccessFrame(may_write=False), OutputFrame(b"")]
        await first.send(InputFrame(b"a long paste"))
        await asyncio.wait_for(started.wait(), 10)
        await first.close()
        assert await read_frame(second) == WriteAccessFrame(may_write=True)
        await second.close()
        async with asyncio.timeout(10):
            while terminals.has_agent_clients:
                await asyncio.sleep(0.01)


async def test_client_with_many_unread_inputs_can_disconnect(tmp_path, monkeypatch):
    """The time limit applies to the total time for all inputs, even if the program reads an input now and then."""
    monkeypatch.setattr(terminals_module, "TERMINAL_INPUT_TIMEOUT_SECONDS", 0.2)
    async with serve_terminal(tmp_path) as (terminals, terminal, connect):
        attempts = 0

        async def accept_slowly(_):
            nonlocal attempts
            attempts += 1
            await asyncio.sleep(0.15)

        monkeypatch.setattr(terminal, "write", accept_slowly)
        client = await connect()
        for _ in range(200):
            await client.send(InputFrame(b"key"))
        await client.close()
        async with asyncio.timeout(5):
            while terminals.has_agent_clients:
                await asyncio.sleep(0.01)
    assert attempts == 200


async def test_long_input_to_a_slow_program_arrives_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(terminals_module, "TERMINAL_INPUT_TIMEOUT_SECONDS", 2.0)
    async with serve_terminal(tmp_path) as (_, terminal, connect):
        original = terminal.write

        async def accept_slowly(data):
            await asyncio.sleep(0.15)
            await original(data)

        monkeypatch.setattr(terminal, "write", accept_slowly)
        client = await connect()
        for _ in range(20):
            await client.send(InputFrame(b"x" * 4096))
        await terminal.wait_until(lambda: len(terminal.typed) == 20 * 4096)


async def test_all_clients_receive_the_same_output_and_late_clients_receive_a_replay(tmp_path):
    async with serve_terminal(tmp_path) as (terminals, terminal, connect):
        shared = terminal.shared
        shared.broadcast(b"x" * TERMINAL_REPLAY_BYTES)
        shared.broadcast(b"the last")
        connections = [await connect(), await connect()]
        for connection in connections:
            await read_frame(connection)
            replayed = await read_frame(connection)
            assert (len(replayed.data), replayed.data[-8:]) == (TERMINAL_REPLAY_BYTES, b"the last")
        shared.broadcast(b"news")
        assert [await read_frame(connection) for connection in connections] == [OutputFrame(b"news")] * 2
        terminals.close_agent_terminal(ExitStatus(5))
        assert [await read_frame(connection) for connection in connections] == [EndFrame(5)] * 2


@pytest.mark.parametrize("cut", [b"\x1b[1;2H", "é".encode(), b"de"])
async def test_replay_of_recent_output_does_not_begin_inside_a_sequence(tmp_path, cut):
    async with serve_terminal(tmp_path) as (_, terminal, connect):
        kept = b"\x1b[2Jabc"
        kept += b"x" * (TERMINAL_REPLAY_BYTES - len(kept) - 1)
        terminal.shared.broadcast(cut + kept)
        viewer = await connect(READ_ONLY_TERMINAL)
        await read_frame(viewer)
        assert (await read_frame(viewer)).data == kept


@pytest.mark.parametrize("recorded", [b"[H" + b"\x1b[2Jabc", "é".encode() * 9])
async def test_short_output_is_replayed_from_its_start(tmp_path, recorded):
    async with serve_terminal(tmp_path) as (_, terminal, connect):
        terminal.shared.broadcast(recorded)
        viewer = await connect(READ_ONLY_TERMINAL)
        await read_frame(viewer)
        assert (await read_frame(viewer)).data == recorded


async def test_replay_without_sequences_does_not_begin_inside_a_character(tmp_path):
    async with serve_terminal(tmp_path) as (_, terminal, connect):
        terminal.shared.broadcast("é".encode() * TERMINAL_REPLAY_BYTES + b"x")
        viewer = await connect(READ_ONLY_TERMINAL)
        await read_frame(viewer)
        assert (await read_frame(viewer)).data.decode().startswith("éé")


async def test_slow_client_is_disconnected_without_affecting_others(tmp_path):
    async with serve_terminal(tmp_path) as (_, terminal, connect):
        slow_client, fast_client = await connect(), await connect()
        for _ in range(2):
            await read_frame(fast_client)
        shown_bytes, changes = 0, []
        for _ in range(200):
            terminal.shared.broadcast(b"x" * 20_000)
            while not isinstance(frame := await read_frame(fast_client), OutputFrame):
                changes.append(frame)
            shown_bytes += len(frame.data)
        assert (shown_bytes, changes) == (4_000_000, [WriteAccessFrame(may_write=True)])
        last = None
        while not isinstance(last, EndFrame):
            last = await read_frame(slow_client)
        assert last.exit_code is None
        reconnected = await connect(READ_ONLY_TERMINAL)
        assert await read_frame(reconnected) == WriteAccessFrame(may_write=False)


async def test_number_of_clients_is_bounded(tmp_path):
    async with serve_terminal(tmp_path) as (_, _, connect):
        for _ in range(TERMINAL_CLIENTS_MAX):
            await read_frame(await connect())
        with pytest.raises(TerminalRefusedError, match="close one"):
            await connect()


class SandboxWithShells:
    """A sandbox that records the terminals opened in it. Each terminal runs until it is hung up."""

    def __init__(self):
        self.opened = []

    async def open_terminal(self, _command, _size):
        self.opened.append(RunningShell())
        return self.opened[-1]


class RunningShell(RecordingTerminal):
    """A shell without output."""

    def __init__(self):
        super().__init__()
        self.output, self.hung_up = asyncio.StreamReader(), asyncio.Event()

    async def hang_up(self):
        self.hung_up.set()

    async def wait(self):
        await self.hung_up.wait()
        return ExitStatus(0)


async def test_refused_terminals_start_no_shell(tmp_path):
    """If each refused terminal started a shell, a client that keeps retrying would fill the sandbox with processes."""
    shell = OpenTerminal(24, 80)
    async with serve_terminal(tmp_path, is_headless=True) as (terminals, _, connect):
        sandbox = SandboxWithShells()
        terminals.enable(SandboxTerminals(sandbox, {}, "/"))
        with pytest.raises(TerminalRefusedError, match="headless"):
            await connect()
        connections = [await connect(shell) for _ in range(TERMINAL_CLIENTS_MAX)]
        for connection in connections:
            assert await read_frame(connection) == WriteAccessFrame(may_write=True)
        for _ in range(3):
            with pytest.raises(TerminalRefusedError, match="close one"):
                await connect(shell)
        await connections[0].close()
        await asyncio.wait_for(sandbox.opened[0].hung_up.wait(), 10)
        assert len(sandbox.opened) == TERMINAL_CLIENTS_MAX
        assert await read_frame(await connect(shell)) == WriteAccessFrame(may_write=True)
        assert len(sandbox.opened) == TERMINAL_CLIENTS_MAX + 1


async def test_terminals_of_a_headless_agent_and_a_closed_sandbox_are_refused(tmp_path):
    async with serve_terminal(tmp_path, is_headless=True) as (terminals, _, connect):
        with pytest.raises(TerminalRefusedError, match="headless"):
            await connect()
        terminals.disable()
        with pytest.raises(TerminalRefusedError, match="is not running"):
            await connect(OpenTerminal(24, 80))


def test_disabled_terminals_cannot_be_enabled_later():
    """The agent may have exited before its start is recorded."""
    terminals = TerminalServer(None, CpuThrottle().queue())
    terminals.disable()
    terminals.enable(SandboxTerminals(RecordingTerminal(), {}, "/"))
    with pytest.raises(TerminalRefusedError, match="is not running"):
        terminals.check_can_open(OpenTerminal(24, 80))


async def test_client_that_leaves_during_output_causes_no_unhandled_error(tmp_path, monkeypatch):
    # The garbage collector may finalize a future before the protocol, although the protocol would mark the future's
    # exception as retrieved.
    monkeypatch.delattr(asyncio.StreamReaderProtocol, "__del__")
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context["message"]))
    async with serve_terminal(tmp_path) as (terminals, terminal, connect):
        for _ in range(3):
            clients = [await connect(READ_ONLY_TERMINAL) for _ in range(TERMINAL_CLIENTS_MAX)]
            for client in clients:
                await read_frame(client)
            closing = asyncio.gather(*(client.close() for client in clients))
            while terminals.has_agent_clients:
                terminal.shared.broadcast(b"more")
                await asyncio.sleep(0)
            await closing
        gc.collect()
        await asyncio.sleep(0)
    assert problems == []


class RefusingSandbox:
    """A sandbox whose refusal contains a secret value."""

    async def open_terminal(self, command, size):
        raise AttemptError(FailureCode.SANDBOX_LOST, "It failed: the-secret-value")


@pytest.mark.parametrize(
    ("redactor", "message"),
    [
        (SecretRedactor({"TOKEN": "the-secret-value"}), "It failed: [REDACTED:TOKEN]"),
        (None, "It failed: the-secret-value"),
    ],
)
async def test_reason_why_a_shell_cannot_be_opened_is_redacted(tmp_path, redactor, message):
    async with serve_terminal(tmp_path, redactor=redactor) as (terminals, _, connect):
        terminals.enable(SandboxTerminals(RefusingSandbox(), {}, "/"))
        connection = await connect(OpenTerminal(30, 100))
        assert await read_frame(connection) == EndFrame(message=message)
