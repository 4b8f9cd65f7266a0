"""The agent's terminal behind a runner's control socket: one types, all look on, nobody holds the others up."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from sandbox.interfaces.placement import Reply, TerminalOrder
from sandbox.interfaces.runtime import ExitStatus, TerminalSize
from sandbox.interfaces.terminals import EndFrame, InputFrame, OutputFrame, ResizeFrame, RoleFrame, TerminalRefusedError
from sandbox.model.limits import TERMINAL_REPLAY_BYTES, TERMINALS_MAX
from sandbox.placements.local.runner_client import UnixRunnerClient
from sandbox.runner import terminals as terminals_module
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.terminals import SharedTerminal, TerminalServer
from sandbox.system.cpu_throttle import CpuThrottle

AGENT = TerminalOrder(30, 100, agent=True)
LOOK = TerminalOrder(30, 100, agent=True, looks_on=True)


class PlayedTerminal:
    """Remembers."""

    def __init__(self):
        self.typed, self.sizes, self.changed = b"", [], asyncio.Event()

    async def write(self, data):
        self.typed += data
        self.changed.set()

    async def resize(self, size):
        self.sizes.append(size)
        self.changed.set()

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def attended(tmp_path):
    """A played terminal that many can come to; `open` brings one more client."""
    terminals, played = TerminalServer(None, CpuThrottle().queue()), PlayedTerminal()
    terminals.enable(object(), {}, "/")
    terminals.agent_terminal = SharedTerminal(played)
    control, lines = UnixRunnerClient(tmp_path), []

    async def come(order=AGENT):
        lines.append(await control.open_terminal("abcdefghijkl", order))
        return lines[-1]

    async with serve_control_socket(tmp_path / "abcdefghijkl.sock", lambda _: Reply(done=True), terminals):
        yield terminals, played, come
        for line in lines:
            await line.close()
        async with asyncio.timeout(10):
            await terminals.wait_until_idle(0.01)


async def heard(line):
    async with asyncio.timeout(10):
        return await line.read()


def test_who_came_first_types_and_the_next_takes_over(tmp_path):
    async def story():
        async with attended(tmp_path) as (terminals, played, come):
            first = await come()
            assert [await heard(first) for _ in range(2)] == [RoleFrame(types=True), OutputFrame(b"")]
            watching = await come(LOOK)
            second = await come(TerminalOrder(40, 120, agent=True))
            for line in (watching, second):
                assert [await heard(line) for _ in range(2)] == [RoleFrame(types=False), OutputFrame(b"")]
            await second.send(InputFrame(b"not mine"))
            await second.send(ResizeFrame(11, 22))
            await first.send(InputFrame(b"mine"))
            await played.until(lambda: played.typed == b"mine")
            await first.close()
            assert await heard(second) == RoleFrame(types=True)
            await second.send(InputFrame(b" now"))
            await played.until(lambda: played.typed == b"mine now")
            assert played.sizes == [TerminalSize(30, 100), TerminalSize(11, 22)]
            assert terminals.has_agent_clients

    asyncio.run(story())


def test_who_types_what_nobody_reads_can_leave(tmp_path, monkeypatch):
    """Else an agent that takes no keys would count as attended for ever, and nobody else could type."""
    monkeypatch.setattr(terminals_module, "TERMINAL_INPUT_SECONDS", 0.1)

    async def story():
        async with attended(tmp_path) as (terminals, played, come):
            begun = asyncio.Event()

            async def never(_):
                begun.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(played, "write", never)
            first, second = await come(), await come()
            assert [await heard(second) for _ in range(2)] == [RoleFrame(types=False), OutputFrame(b"")]
            await first.send(InputFrame(b"a long paste"))
            await asyncio.wait_for(begun.wait(), 10)
            await first.close()
            assert await heard(second) == RoleFrame(types=True)
            await second.close()
            async with asyncio.timeout(10):
                while terminals.has_agent_clients:
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_all_see_the_same_and_who_comes_later_what_was_last(tmp_path):
    async def story():
        async with attended(tmp_path) as (terminals, _, come):
            shared = terminals.agent_terminal
            shared.broadcast(b"x" * TERMINAL_REPLAY_BYTES)
            shared.broadcast(b"the last")
            lines = [await come(), await come()]
            for line in lines:
                await heard(line)
                replayed = await heard(line)
                assert (len(replayed.data), replayed.data[-8:]) == (TERMINAL_REPLAY_BYTES, b"the last")
            shared.broadcast(b"news")
            assert [await heard(line) for line in lines] == [OutputFrame(b"news")] * 2
            terminals.close_agent_terminal(ExitStatus(5))
            assert [await heard(line) for line in lines] == [EndFrame(5)] * 2

    asyncio.run(story())


def test_one_who_does_not_read_is_cut_off_and_the_others_are_not(tmp_path):
    async def story():
        async with attended(tmp_path) as (terminals, _, come):
            slow, quick = await come(), await come()
            for _ in range(2):
                await heard(quick)
            shown, roles = 0, []
            for _ in range(200):
                terminals.agent_terminal.broadcast(b"x" * 20_000)
                while not isinstance(told := await heard(quick), OutputFrame):
                    roles.append(told)
                shown += len(told.data)
            assert (shown, roles) == (4_000_000, [RoleFrame(types=True)])
            last = None
            while not isinstance(last, EndFrame):
                last = await heard(slow)
            assert last.exit_code is None
            again = await come(LOOK)
            assert await heard(again) == RoleFrame(types=False)

    asyncio.run(story())


def test_there_is_a_bound_on_clients(tmp_path):
    async def story():
        async with attended(tmp_path) as (_, _, come):
            for _ in range(TERMINALS_MAX):
                await heard(await come())
            with pytest.raises(TerminalRefusedError, match="close one"):
                await come()

    asyncio.run(story())


def test_an_agent_without_a_terminal_and_a_sandbox_that_is_over_are_told(tmp_path):
    async def story():
        async with attended(tmp_path) as (terminals, _, come):
            terminals.agent_terminal = None
            with pytest.raises(TerminalRefusedError, match="headless"):
                await come()
            terminals.disable()
            with pytest.raises(TerminalRefusedError, match="does not run"):
                await come(TerminalOrder(24, 80))

    asyncio.run(story())


def test_what_is_closed_before_it_could_begin_stays_closed():
    """An agent may have ended by the time that the disk takes its start."""
    terminals = TerminalServer(None, CpuThrottle().queue())
    terminals.disable()
    terminals.enable(PlayedTerminal(), {}, "/")
    with pytest.raises(TerminalRefusedError, match="does not run now"):
        terminals.check(TerminalOrder(24, 80))
