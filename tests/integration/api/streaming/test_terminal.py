"""The WebSocket to a terminal: who is let in, what goes through, how it ends."""

import asyncio
import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_RUNNING
from sandbox.api.middleware import authentication
from sandbox.interfaces.terminals import EndFrame, InputFrame, OutputFrame, ResizeFrame, RoleFrame


class PlayedLine:
    """Shows what it is told to, and remembers what was wished."""

    def __init__(self, *frames):
        self.wished, self.is_closed = [], asyncio.Event()
        self._frames = asyncio.Queue()
        for frame in frames:
            self._frames.put_nowait(frame)

    def show(self, frame):
        self._frames.put_nowait(frame)

    async def read(self):
        return await self._frames.get()

    async def send(self, frame):
        self.wished.append(frame)
        if frame == InputFrame(b"exit"):
            self.show(EndFrame(7))

    async def close(self):
        self.is_closed.set()


def opening(doors, line, task_id="task-001"):
    """A task whose terminal is this line; the orders that came."""
    doors.tasks.add(task_id, *TO_RUNNING)
    orders = []

    async def open_terminal(_, order):
        orders.append(order)
        return line

    doors.tasks.open_terminal = open_terminal
    return orders


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def address(doors, query="", *, port=0, task_id="task-001"):
    return doors.ws(port=port).replace("/stream", f"/{task_id}/terminal{query}")


def test_bytes_and_sizes_go_through_on_both_ports(open_doors):
    async def story():
        async with open_doors() as doors:
            for port in (doors.port, doors.stream_port):
                line = PlayedLine(RoleFrame(types=True), OutputFrame(b"\x1b[1mhi\xff"))
                orders = opening(doors, line, f"task-{port}")
                where = address(doors, "?rows=50&columns=132", port=port, task_id=f"task-{port}")
                async with connect(where) as terminal:
                    assert json.loads(await terminal.recv()) == {"type": "role", "types": True}
                    assert await terminal.recv() == b"\x1b[1mhi\xff"
                    await terminal.send(json.dumps({"type": "resize", "rows": 10, "columns": 20}))
                    await terminal.send(b"")
                    await terminal.send(b"exit")
                    assert json.loads(await terminal.recv()) == {"type": "exit", "exit_code": 7, "message": ""}
                    with pytest.raises(ConnectionClosed) as closed:
                        await terminal.recv()
                assert closed.value.rcvd.code == 1000
                assert (orders[0].rows, orders[0].columns) == (50, 132)
                assert line.wished == [ResizeFrame(10, 20), InputFrame(b"exit")]
                await asyncio.wait_for(line.is_closed.wait(), 10)

    asyncio.run(story())


def test_a_client_that_leaves_leaves_the_terminal(open_doors):
    async def story():
        async with open_doors() as doors:
            line = PlayedLine(RoleFrame(types=True))
            opening(doors, line)
            async with connect(address(doors)) as terminal:
                await terminal.recv()
                assert not line.is_closed.is_set()
            await asyncio.wait_for(line.is_closed.wait(), 10)

    asyncio.run(story())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ls",
        '{"type": "resize", "rows": "1", "columns": 2}',
        '{"type": "exec"}',
        pytest.param('{"type": ' + "[" * 50_000, id="deep"),
    ],
)
def test_text_that_is_no_resize_ends_it(open_doors, text: str):
    async def story():
        async with open_doors() as doors:
            line = PlayedLine()
            opening(doors, line)
            async with connect(address(doors)) as terminal:
                await terminal.send(text)
                with pytest.raises(ConnectionClosed) as closed:
                    await asyncio.wait_for(terminal.recv(), 10)
            assert (closed.value.rcvd.code, line.wished) == (1008, [])

    asyncio.run(story())


def test_a_server_that_shuts_down_lets_go_of_it(open_doors):
    async def story():
        async with open_doors() as doors:
            line = PlayedLine(RoleFrame(types=True))
            opening(doors, line)
            async with connect(address(doors)) as terminal:
                await terminal.recv()
                doors.shutting_down.set()
                with pytest.raises(ConnectionClosed) as closed:
                    await asyncio.wait_for(terminal.recv(), 10)
            assert closed.value.rcvd.code == 1001
            assert line.is_closed.is_set()

    asyncio.run(story())


async def refused(where, **options):
    with pytest.raises(InvalidStatus) as caught:
        await connect(where, **options)
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]


def test_mistakes_are_answers_to_the_handshake(open_doors):
    async def story():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            assert await refused(address(doors)) == (409, "no_terminal")
            assert await refused(address(doors, task_id="nobody")) == (404, "task_not_found")
            assert await refused(address(doors, "?rows=x")) == (400, "invalid_parameter")
            assert await refused(address(doors), origin="https://evil.example") == (403, "forbidden")

    asyncio.run(story())


def test_only_an_operator_gets_one(open_doors):
    async def story():
        async with open_doors(FakeAccess(vera="viewer", otto="operator")) as doors:
            opening(doors, PlayedLine(RoleFrame(types=True)))
            assert await refused(address(doors)) == (401, "unauthorized")
            vera = {"Authorization": "Bearer vera"}
            assert await refused(address(doors), additional_headers=vera) == (403, "forbidden")
            async with connect(address(doors), additional_headers={"Authorization": "Bearer otto"}) as terminal:
                assert json.loads(await terminal.recv())["types"]

    asyncio.run(story())


def test_whose_token_is_revoked_types_nothing_more(open_doors, monkeypatch):
    """Also while the terminal shows nothing, as when a password is asked for."""
    monkeypatch.setattr(authentication, "RECHECK_SECONDS", 0.0)
    tokens = FakeAccess(otto="operator", olga="operator")

    async def story():
        async with open_doors(tokens) as doors:
            line = PlayedLine(RoleFrame(types=True))
            opening(doors, line)
            async with connect(address(doors), additional_headers={"Authorization": "Bearer otto"}) as terminal:
                await terminal.recv()
                await terminal.send(b"good")
                await until(lambda: line.wished)
                del tokens.roles["otto"]
                await terminal.send(b"evil")
                with pytest.raises(ConnectionClosed) as closed:
                    await asyncio.wait_for(terminal.recv(), 5)
                assert closed.value.rcvd.code == 1008
                await asyncio.wait_for(line.is_closed.wait(), 5)
                assert line.wished == [InputFrame(b"good")]

    asyncio.run(story())
