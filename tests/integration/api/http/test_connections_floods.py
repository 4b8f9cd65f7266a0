"""Floods of short chunks or WebSocket frames are parsed in bounded batches, so other clients are served in between."""

import asyncio
import base64
import contextlib
import itertools
import socket

import httpx2
import pytest
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api.http import connections, request_framing
from sandbox.model import events as e
from sandbox.primitives.fair_client_shares import MESSAGES_PER_TURN_MAX

CONNECTIONS = 8
PER_LOOP_ITERATION_MAX = 1000
CHUNKS = b"1\r\nx\r\n" * 10_000
PING = b"\x89\x80\0\0\0\0"
FIRST_FRAGMENT, FRAGMENT = b"\x02\x80\0\0\0\0", b"\0\x80\0\0\0\0"  # without content
HEAD = b"%b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
HANDSHAKE = (
    b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n%b\r\n"
)
AS_VIEWER = b"Authorization: Bearer vera\r\n"
MANIFEST = b"""version: "1"
kind: Task
metadata: {name: Twin}
repository: {url: "https://example.org/a.git", branch: main}
claude: {prompt: Work.}
"""


class CallsPerLoopIteration:
    """Counts the calls to a method: the total, and the maximum in one iteration of the event loop."""

    def __init__(self, monkeypatch, owner, name):
        self.total = self.maximum = self._count_in_iteration = 0
        original = getattr(owner, name)

        def counted(*arguments):
            self.total, self._count_in_iteration = self.total + 1, self._count_in_iteration + 1
            self.maximum = max(self.maximum, self._count_in_iteration)
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    async def watch(self):
        while True:
            self._count_in_iteration = 0
            await asyncio.sleep(0)


async def flood(port, head, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    first = await asyncio.wait_for(reader.readline(), 10)
    writer.write(data)
    return first, reader, writer


@pytest.mark.parametrize("request_line", [b"POST /api/v1/tasks", b"GET /api/health"])
async def test_short_chunks_are_parsed_in_batches(running_api, wait_until, monkeypatch, request_line):
    chunks = CallsPerLoopIteration(monkeypatch, request_framing.RequestFraming, "_read_chunk")
    async with running_api(FakeTokenStore(otto="operator")) as api:
        watching = asyncio.create_task(chunks.watch())
        clients = [await flood(api.port, HEAD % request_line, CHUNKS) for _ in range(CONNECTIONS)]
        await wait_until(lambda: chunks.total >= 5000, 30)
        async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer otto"}) as client:
            assert (await client.get("/api/v1/tasks")).status_code == 200
        assert chunks.maximum <= PER_LOOP_ITERATION_MAX
        watching.cancel()
        for _, _, writer in clients:
            writer.close()


async def test_short_chunks_that_arrive_with_the_head_are_parsed_in_batches(running_api, wait_until, monkeypatch):
    """The chunks are buffered before the request has been authenticated."""
    chunks = CallsPerLoopIteration(monkeypatch, request_framing.RequestFraming, "_read_chunk")
    async with running_api(FakeTokenStore(otto="operator")) as api:
        clients = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(CONNECTIONS)]
        watching = asyncio.create_task(chunks.watch())
        for _, writer in clients:
            writer.write(HEAD % b"POST /api/v1/tasks" + CHUNKS)
        await wait_until(lambda: chunks.total >= 5000, 30)
        assert chunks.maximum <= PER_LOOP_ITERATION_MAX
        watching.cancel()
        for _, writer in clients:
            writer.close()


async def test_malformed_requests_are_answered_in_batches(running_api, monkeypatch):
    response_calls = CallsPerLoopIteration(monkeypatch, connections, "_bad_request_response")

    async def scenario():
        async with running_api(FakeTokenStore(vera="viewer")) as api:
            clients = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(300)]
            watching = asyncio.create_task(response_calls.watch())
            for _, writer in clients:
                writer.write(b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n")
            responses = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in clients)), 30)
            assert response_calls.maximum <= 2 * MESSAGES_PER_TURN_MAX
            watching.cancel()
            for _, writer in clients:
                writer.close()
            return responses

    responses = await scenario()
    assert {response.split(b"\r\n")[0] for response in responses} == {b"HTTP/1.1 400 Bad Request"}


HEADS = {
    "an ordinary head": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many fields": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 110 + b"\r\n",
    "a long path": b"GET /" + b"%41" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a handshake with many protocols": HANDSHAKE % (b"Sec-WebSocket-Protocol: " + b"a," * 120 + b"b\r\n"),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
async def test_heads_of_new_connections_are_parsed_in_batches(running_api, monkeypatch, head):
    parsed = CallsPerLoopIteration(monkeypatch, request_framing.RequestFraming, "_finish_head")
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        clients = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(300)]
        watching = asyncio.create_task(parsed.watch())
        for _, writer in clients:
            writer.write(head)
        first = await asyncio.wait_for(asyncio.gather(*(reader.readline() for reader, _ in clients)), 30)
        assert {line.split()[1] for line in first} == {b"401"}
        assert parsed.total == 300
        assert parsed.maximum <= MESSAGES_PER_TURN_MAX
        watching.cancel()
        for _, writer in clients:
            writer.close()


async def test_costly_head_of_a_user_is_answered(running_api):
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        for _ in range(2):
            head = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n" + AS_VIEWER + b"a: b\r\n" * 100 + b"\r\n"
            writer.write(head)
            response = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert response.startswith(b"HTTP/1.1 200 ")
            length = int(response.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await asyncio.wait_for(reader.readexactly(length), 10)
        writer.close()


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_body_in_chunks_of_any_size_is_read(running_api, size):
    manifest = MANIFEST + b"#" * 200_000 if size == 100_000 else MANIFEST
    parts = [bytes(part) for part in itertools.batched(manifest, size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    request = HEAD % b"POST /api/v1/tasks?dry_run=true" + body

    async def scenario():
        async with running_api() as api:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            last = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            writer.write(request * 3 + last)
            response = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return response

    response = await scenario()
    assert response.count(b"HTTP/1.1 200 OK") == 4
    assert response.count(b'"dry_run":true') == 3


async def test_short_frames_are_parsed_in_batches(running_api, wait_until, monkeypatch):
    pings = CallsPerLoopIteration(monkeypatch, connections.WebSocketProtocol, "handle_ping")
    async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api:
        watching = asyncio.create_task(pings.watch())
        clients = [await flood(api.websocket_port, HANDSHAKE % AS_VIEWER, PING * 10_000) for _ in range(CONNECTIONS)]
        assert {first for first, _, _ in clients} == {b"HTTP/1.1 101 Switching Protocols\r\n"}
        await wait_until(lambda: pings.total >= 5000, 30)
        async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer otto"}) as client:
            assert (await client.get("/api/v1/tasks")).status_code == 200
        assert pings.maximum <= PER_LOOP_ITERATION_MAX
        watching.cancel()
        for _, _, writer in clients:
            writer.close()


async def test_frames_of_a_rejected_handshake_are_not_parsed(running_api, monkeypatch):
    pings = CallsPerLoopIteration(monkeypatch, connections.WebSocketProtocol, "handle_ping")

    async def scenario():
        async with running_api(FakeTokenStore(vera="viewer")) as api:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", api.websocket_port)
                writer.write(HANDSHAKE % b"")
                for _ in range(20):
                    writer.write(PING * 1000)
                    await asyncio.sleep(0)
                with contextlib.suppress(ConnectionError):
                    assert b" 401 " in await asyncio.wait_for(reader.readline(), 10)
                writer.close()

    await scenario()
    assert pings.total == 0


async def test_empty_fragments_of_a_message_are_not_buffered(running_api, wait_until, monkeypatch):
    """A message can have any number of empty fragments, which do not increase its size."""
    kept = []
    original = connections.WebSocketProtocol.handle_cont

    def handle_cont(connection, event):
        original(connection, event)
        kept.append(len(connection.frames))

    monkeypatch.setattr(connections.WebSocketProtocol, "handle_cont", handle_cont)
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        data = FIRST_FRAGMENT + FRAGMENT * 3000
        first, _, writer = await flood(api.websocket_port, HANDSHAKE % AS_VIEWER, data)
        assert first == b"HTTP/1.1 101 Switching Protocols\r\n"
        await wait_until(lambda: len(kept) == 3000, 30)
        writer.close()
    assert max(kept) <= 100


async def test_every_ping_from_a_reading_client_is_answered(running_api):
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        api.tasks.add("task-001", *TO_RUNNING)
        headers = {"Authorization": "Bearer vera"}
        async with connect(api.ws("?task_id=task-001"), additional_headers=headers) as stream:
            pongs = [await stream.ping() for _ in range(500)]
            await stream.send("x" * 60_000)  # ignored
            pongs.append(await stream.ping())
            await asyncio.wait_for(asyncio.gather(*pongs), 20)


TOO_LARGE_FRAME = b"\x82\xff" + (2**62).to_bytes(8) + bytes(4)


async def test_invalid_frame_during_a_stream_is_not_logged_as_an_error(running_api, caplog):
    """Otherwise, a client could fill the server's log with tracebacks."""
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        api.tasks.add("task-001", *TO_RUNNING, *[e.Output.from_bytes("stdout", b"line\n")] * 2000)
        handshake = HANDSHAKE.replace(b"stream HTTP", b"stream?task_id=task-001&after=0 HTTP") % AS_VIEWER
        for _ in range(10):
            first, reader, writer = await flood(api.websocket_port, handshake, TOO_LARGE_FRAME)
            assert first == b"HTTP/1.1 101 Switching Protocols\r\n"
            assert (1009).to_bytes(2) in await asyncio.wait_for(reader.read(), 20)
            writer.close()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def test_burst_of_connections_is_accepted_in_batches(running_api, wait_until, monkeypatch):
    """Otherwise, a flood of connections would block the event loop for seconds."""
    accepts = CallsPerLoopIteration(monkeypatch, connections.HttpProtocol, "connection_made")
    async with running_api(FakeTokenStore(otto="operator")) as api:
        watching = asyncio.create_task(accepts.watch())
        sockets = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(300)]  # queued by the kernel
        async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer otto"}) as client:
            assert (await client.get("/api/v1/tasks")).status_code == 200
        await wait_until(lambda: accepts.total > 300)
        assert accepts.maximum <= 8
        watching.cancel()
        for each in sockets:
            each.close()
