"""A client that does not read uses a bounded amount of server time and memory, and does not affect other clients."""

import asyncio
import json
import os
import socket
from contextlib import contextmanager

import httpx2
import uvicorn
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import connections
from sandbox.model import events as e

PATH = "/api/v1/tasks/task-001/logs?follow=true&after=0"
LARGE_OUTPUT = [e.Output.from_bytes("stdout", os.urandom(30_000).hex().encode() + b"\n") for _ in range(200)]


@contextmanager
def stalled_client(port: int):
    """Yield a client that follows the logs and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield client


async def follow(client: httpx2.AsyncClient) -> list[dict]:
    async with client.stream("GET", PATH) as response:
        return [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: ")]


async def test_stalled_stream_is_closed_and_others_continue(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(connections, "STALL_TIMEOUT_SECONDS", 0.3)
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=30) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        with stalled_client(api.port):
            following = asyncio.create_task(follow(client))
            await wait_until(lambda: api.count_open_streams("logs") == 2)
            api.tasks.record("task-001", *LARGE_OUTPUT)
            await wait_until(lambda: api.count_open_streams("logs") == 1)
            api.tasks.record("task-001", *TO_COMPLETED)
            assert (await following)[-1]["type"] == "end"


async def test_reused_task_id_streams_only_the_new_events(running_api, wait_until):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=30) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        with stalled_client(api.port):
            await wait_until(lambda: api.count_open_streams("logs") == 1)
            api.tasks.record("task-001", *LARGE_OUTPUT, *TO_COMPLETED)
            assert (await follow(client))[-1]["type"] == "end"
            del api.tasks.entries["task-001"]
            api.tasks.add("task-001", *TO_RUNNING)
            following = asyncio.create_task(follow(client))
            await wait_until(lambda: api.count_open_streams("logs") == 2)
            api.tasks.record("task-001", e.ErrorReported("slow", "Slow."), *TO_COMPLETED)
            events = await asyncio.wait_for(following, 10)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events].count("error") == 1
    assert "output" not in {event["type"] for event in events}


class RecordingTransport(asyncio.Transport):
    """A transport that records written data."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""
        self.is_paused = False
        self.on_write = lambda: None

    def pause_reading(self):
        self.is_paused = True

    def resume_reading(self):
        self.is_paused = False

    def write(self, data):
        self.written += data
        if data:
            self.on_write()

    def is_closing(self):
        return False

    def close(self):
        pass


async def open_websocket(app):
    """Return a connection to the app after the handshake, its transport, and the client's protocol."""
    config = uvicorn.Config(app, ws=connections.WebSocketProtocol, lifespan="off", log_config=None)
    config.load()
    connection, transport = connections.WebSocketProtocol(config, ServerState(), {}), RecordingTransport()
    connection.connection_made(transport)
    client = ClientProtocol(parse_uri("ws://localhost/"))
    client.send_request(client.connect())
    connection.data_received(b"".join(client.data_to_send()))
    while not transport.written:
        await asyncio.sleep(0)
    client.receive_data(transport.written)
    transport.written = b""
    assert len(client.events_received()) == 1  # the response to the handshake
    return connection, transport, client


async def test_stalled_client_gets_a_pong_only_for_the_latest_ping():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    async def receive(connection, client):
        connection.data_received(b"".join(client.data_to_send()))
        while connection.transport.is_paused:
            await asyncio.sleep(0)

    connection, transport, client = await open_websocket(app)
    client.send_ping(b"first")
    await receive(connection, client)
    assert b"first" in transport.written
    transport.written = b""
    connection.pause_writing()
    for number in range(1000):
        client.send_ping(b"%d" % number)
    await receive(connection, client)
    assert transport.written == b""
    connection.resume_writing()
    client.receive_data(transport.written)
    pongs = [frame for frame in client.events_received() if getattr(frame, "opcode", None) is Opcode.PONG]
    assert [frame.data for frame in pongs] == [b"999"]
    connection.connection_lost(None)


async def test_part_of_a_message_is_sent_once_the_client_has_read_the_previous_part():
    may_send = asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await may_send.wait()
        for text, has_more in (("one ", True), ("two ", True), ("three", False), ("four", False)):
            await send({"type": "websocket.send", "text": text, connections.MORE_TEXT: has_more})
        await send({"type": "websocket.close"})

    connection, transport, client = await open_websocket(app)
    transport.on_write = connection.pause_writing
    may_send.set()
    frames = []
    while not frames or frames[-1].opcode is not Opcode.CLOSE:
        while not transport.written:
            await asyncio.sleep(0)
        client.receive_data(transport.written)
        transport.written = b""
        (frame,) = client.events_received()
        frames.append(frame)
        connection.resume_writing()
    assert [(frame.opcode, bytes(frame.data), frame.fin) for frame in frames[:-1]] == [
        (Opcode.TEXT, b"one ", False),
        (Opcode.CONT, b"two ", False),
        (Opcode.CONT, b"three", True),
        (Opcode.TEXT, b"four", True),
    ]
    connection.connection_lost(None)


async def test_rest_of_a_message_is_not_sent_after_the_client_disconnected():
    """asyncio would log a warning for each write to a lost connection."""
    may_send, is_refused = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await may_send.wait()
        await send({"type": "websocket.send", "text": "one ", connections.MORE_TEXT: True})
        try:
            await send({"type": "websocket.send", "text": "two", connections.MORE_TEXT: False})
        except ClientDisconnected:
            is_refused.set()

    connection, transport, _ = await open_websocket(app)
    transport.on_write = connection.pause_writing
    may_send.set()
    while not transport.written:
        await asyncio.sleep(0)
    transport.written = b""
    connection.connection_lost(None)
    await asyncio.wait_for(is_refused.wait(), 30)
    assert transport.written == b""
