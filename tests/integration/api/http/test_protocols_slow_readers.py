"""Who takes nothing of what is ready costs the server a bounded time and memory, and nobody else anything."""

import asyncio
import json
import os
import socket
from contextlib import contextmanager

import httpx
import uvicorn
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import protocols
from sandbox.model import events as e

PATH = "/api/v1/tasks/task-001/logs?follow=true&after=0"
MUCH = [e.Output.from_bytes("stdout", os.urandom(30_000).hex().encode() + b"\n") for _ in range(200)]


@contextmanager
def stalled(port: int):
    """A follower that reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield client


async def follow(client: httpx.AsyncClient) -> list[dict]:
    async with client.stream("GET", PATH) as response:
        return [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: ")]


def test_a_follower_that_takes_nothing_is_let_go_and_others_are_not(open_doors, until, monkeypatch):
    monkeypatch.setattr(protocols, "STALL_TIMEOUT_SECONDS", 0.3)

    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=30) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            with stalled(doors.port):
                taking = asyncio.create_task(follow(client))
                await until(lambda: doors.open_streams("logs") == 2)
                doors.tasks.tell("task-001", *MUCH)
                await until(lambda: doors.open_streams("logs") == 1)
                doors.tasks.tell("task-001", *TO_COMPLETED)
                assert (await taking)[-1]["type"] == "end"

    asyncio.run(scene())


def test_a_new_task_of_a_pruned_ones_name_has_its_own_story(open_doors, until):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=30) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            with stalled(doors.port):
                await until(lambda: doors.open_streams("logs") == 1)
                doors.tasks.tell("task-001", *MUCH, *TO_COMPLETED)
                assert (await follow(client))[-1]["type"] == "end"
                del doors.tasks.stories["task-001"]
                doors.tasks.add("task-001", *TO_RUNNING)
                taking = asyncio.create_task(follow(client))
                await until(lambda: doors.open_streams("logs") == 2)
                doors.tasks.tell("task-001", e.ErrorReported("slow", "Slow."), *TO_COMPLETED)
                told = await asyncio.wait_for(taking, 10)
        assert [one["seq"] for one in told] == list(range(1, len(told) + 1))
        assert [one["type"] for one in told].count("error") == 1
        assert "output" not in {one["type"] for one in told}

    asyncio.run(scene())


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""

    def write(self, data):
        self.written += data

    def is_closing(self):
        return False

    def close(self):
        pass


def test_only_the_latest_ping_of_who_takes_nothing_is_answered():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    async def scene():
        config = uvicorn.Config(app, ws=protocols.WebSocketProtocol, lifespan="off", log_config=None)
        config.load()
        connection, transport = protocols.WebSocketProtocol(config, ServerState(), {}), Transport()
        connection.connection_made(transport)
        client = ClientProtocol(parse_uri("ws://localhost/"))
        client.send_request(client.connect())
        connection.data_received(b"".join(client.data_to_send()))
        while not transport.written:
            await asyncio.sleep(0)
        client.receive_data(transport.written)
        transport.written = b""
        client.send_ping(b"first")
        connection.data_received(b"".join(client.data_to_send()))
        assert b"first" in transport.written
        transport.written = b""
        connection.pause_writing()
        for number in range(1000):
            client.send_ping(b"%d" % number)
        connection.data_received(b"".join(client.data_to_send()))
        assert transport.written == b""
        connection.resume_writing()
        client.receive_data(transport.written)
        events = [one for one in client.events_received() if getattr(one, "opcode", None) is Opcode.PONG]
        assert [one.data for one in events] == [b"999"]
        connection.connection_lost(None)

    asyncio.run(scene())
