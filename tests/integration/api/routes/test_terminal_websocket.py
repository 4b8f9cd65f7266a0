"""The terminal WebSocket: authentication, data in both directions, and close codes."""

import asyncio
import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from doubles.fake_tasks import TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication
from sandbox.interfaces.runner import EndFrame, InputFrame, OutputFrame, ResizeFrame, WriteAccessFrame


class FakeConnection:
    """A terminal connection that sends scripted frames and records input."""

    def __init__(self, *frames):
        self.received, self.is_closed = [], asyncio.Event()
        self._frames = asyncio.Queue()
        for frame in frames:
            self._frames.put_nowait(frame)

    def push(self, frame):
        self._frames.put_nowait(frame)

    async def read(self):
        return await self._frames.get()

    async def send(self, frame):
        self.received.append(frame)
        if frame == InputFrame(b"exit"):
            self.push(EndFrame(7))

    async def close(self):
        self.is_closed.set()


def serve_terminal(api, connection, task_id="task-001"):
    """Add a task with this terminal connection; return a list that collects the orders to open the terminal."""
    api.tasks.add(task_id, *TO_RUNNING)
    orders = []

    async def open_terminal(_, order):
        orders.append(order)
        return connection

    api.tasks.open_terminal = open_terminal
    return orders


async def wait_until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def terminal_url(api, query="", *, port=0, task_id="task-001"):
    return api.ws(port=port).replace("/stream", f"/{task_id}/terminal{query}")


async def test_input_output_and_resize_work_on_both_ports(running_api):
    async with running_api() as api:
        for port in (api.port, api.websocket_port):
            connection = FakeConnection(WriteAccessFrame(may_write=True), OutputFrame(b"\x1b[1mhi\xff"))
            orders = serve_terminal(api, connection, f"task-{port}")
            url = terminal_url(api, "?rows=50&columns=132", port=port, task_id=f"task-{port}")
            async with connect(url) as terminal:
                assert json.loads(await terminal.recv()) == {"type": "role", "types": True}
                assert await terminal.recv() == b"\x1b[1mhi\xff"
                await terminal.send(json.dumps({"type": "resize", "rows": 10, "columns": 20}))
                await terminal.send(b"")
                await terminal.send(b"exit")
                assert json.loads(await terminal.recv()) == {"type": "exit", "exit_code": 7, "message": ""}
                with pytest.raises(ConnectionClosed) as raised:
                    await terminal.recv()
            assert raised.value.rcvd.code == 1000
            assert (orders[0].rows, orders[0].columns) == (50, 132)
            assert connection.received == [ResizeFrame(10, 20), InputFrame(b"exit")]
            await asyncio.wait_for(connection.is_closed.wait(), 10)


async def test_input_in_short_fragments_arrives_whole(running_api):
    pasted = bytes(range(1, 251)) * 40
    async with running_api() as api:
        connection = FakeConnection(WriteAccessFrame(may_write=True))
        serve_terminal(api, connection)
        async with connect(terminal_url(api)) as terminal:
            await terminal.send([pasted[index : index + 1] for index in range(len(pasted))])
            await wait_until(lambda: connection.received)
        assert connection.received == [InputFrame(pasted)]


async def test_disconnected_client_closes_the_terminal(running_api):
    async with running_api() as api:
        connection = FakeConnection(WriteAccessFrame(may_write=True))
        serve_terminal(api, connection)
        async with connect(terminal_url(api)) as terminal:
            await terminal.recv()
            assert not connection.is_closed.is_set()
        await asyncio.wait_for(connection.is_closed.wait(), 10)


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
async def test_invalid_text_message_closes_the_terminal(running_api, text: str):
    async with running_api() as api:
        connection = FakeConnection()
        serve_terminal(api, connection)
        async with connect(terminal_url(api)) as terminal:
            await terminal.send(text)
            with pytest.raises(ConnectionClosed) as raised:
                await asyncio.wait_for(terminal.recv(), 10)
        assert (raised.value.rcvd.code, connection.received) == (1008, [])


async def test_shutdown_closes_the_terminal(running_api):
    async with running_api() as api:
        connection = FakeConnection(WriteAccessFrame(may_write=True))
        serve_terminal(api, connection)
        async with connect(terminal_url(api)) as terminal:
            await terminal.recv()
            api.shutting_down.set()
            with pytest.raises(ConnectionClosed) as raised:
                await asyncio.wait_for(terminal.recv(), 10)
        assert raised.value.rcvd.code == 1001
        assert connection.is_closed.is_set()


async def rejection(url, **options):
    with pytest.raises(InvalidStatus) as raised:
        await connect(url, **options)
    response = raised.value.response
    return response.status_code, json.loads(response.body)["error"]


async def test_errors_reject_the_handshake(running_api):
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        assert await rejection(terminal_url(api)) == (409, "no_terminal")
        assert await rejection(terminal_url(api, task_id="nobody")) == (404, "task_not_found")
        assert await rejection(terminal_url(api, "?rows=x")) == (400, "invalid_parameter")
        assert await rejection(terminal_url(api), origin="https://evil.example") == (403, "forbidden")


async def test_terminal_requires_the_operator_role(running_api):
    async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api:
        serve_terminal(api, FakeConnection(WriteAccessFrame(may_write=True)))
        assert await rejection(terminal_url(api)) == (401, "unauthorized")
        viewer_headers = {"Authorization": "Bearer vera"}
        assert await rejection(terminal_url(api), additional_headers=viewer_headers) == (403, "forbidden")
        async with connect(terminal_url(api), additional_headers={"Authorization": "Bearer otto"}) as terminal:
            assert json.loads(await terminal.recv())["types"]


@pytest.mark.parametrize("role", [None, "viewer"])
async def test_input_after_token_revocation_is_discarded(running_api, monkeypatch, role):
    """The token is checked even while the terminal is silent, for example at a password prompt."""
    monkeypatch.setattr(authentication, "RECHECK_INTERVAL_SECONDS", 0.0)
    tokens = FakeTokenStore(otto="operator", olga="operator")
    async with running_api(tokens) as api:
        connection = FakeConnection(WriteAccessFrame(may_write=True))
        serve_terminal(api, connection)
        async with connect(terminal_url(api), additional_headers={"Authorization": "Bearer otto"}) as terminal:
            await terminal.recv()
            await terminal.send(b"good")
            await wait_until(lambda: connection.received)
            tokens.roles = {**tokens.roles, "otto": role} if role else {"olga": "operator"}
            await terminal.send(b"evil")
            with pytest.raises(ConnectionClosed) as raised:
                await asyncio.wait_for(terminal.recv(), 5)
            assert raised.value.rcvd.code == 1008
            await asyncio.wait_for(connection.is_closed.wait(), 5)
            assert connection.received == [InputFrame(b"good")]
