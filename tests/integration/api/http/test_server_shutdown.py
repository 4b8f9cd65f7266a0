"""The server is told to stop while people follow; they are sent home, and nobody can hold it up."""

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import AsyncExitStack

import httpx
import pytest
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_RUNNING
from sandbox.api.http.server import AddressError, bind, set_on_signals
from sandbox.model import events as e
from sandbox.model import limits

LOGS = "/api/v1/tasks/task-001/logs?follow=true"


def test_twenty_followers_are_sent_home_in_time(open_doors, until):
    async def read_to_the_end(client):
        async with client.stream("GET", LOGS) as response:
            return "".join([text async for text in response.aiter_text()])

    async def scene():
        async with open_doors() as doors, AsyncExitStack() as stack:
            doors.tasks.add("task-001", *TO_RUNNING)
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=doors.http, timeout=10))
            # Asked first: nothing tells when the server has it.
            waiting = asyncio.create_task(client.get("/api/v1/tasks/task-001/wait"))
            logs = [asyncio.create_task(read_to_the_end(client)) for _ in range(10)]
            sockets = [await stack.enter_async_context(connect(doors.ws("?task_id=task-001"))) for _ in range(5)]
            sockets += [await stack.enter_async_context(connect(doors.ws())) for _ in range(5)]
            await until(lambda: (doors.open_streams("logs"), doors.open_streams("websocket")) == (10, 10))
            await until(lambda: doors.tasks.open_followers == 1 and len(doors.tasks.subscribers) == 5)
            with set_on_signals(doors.shutting_down):
                started = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(doors.serving, 10)
                assert time.monotonic() - started < limits.SHUTDOWN_SECONDS
            # Whole answers without an end: the task goes on, and the reader may come back.
            for text in await asyncio.gather(*logs):
                assert "event: state_change" in text
                assert "event: end" not in text
            assert (await waiting).json()["state"] == "running"
            for one in sockets:
                async for message in one:
                    assert json.loads(message)["type"] != "end"
                assert one.close_code in {1001, 1012}
            assert doors.tasks.open_followers == 0
            with pytest.raises(httpx.ConnectError):
                await client.get("/api/health")

    asyncio.run(scene())


def test_a_client_that_reads_nothing_cannot_hold_it_up(open_doors, until):
    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            for number in range(300):
                doors.tasks.tell("task-001", e.Output.from_bytes("stdout", b"%d" % number + b"x" * 100_000))
            stuck = socket.create_connection(("127.0.0.1", doors.port))
            stuck.sendall(f"GET {LOGS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            plain = socket.create_connection(("127.0.0.1", doors.port))
            plain.sendall(b"GET /api/v1/tasks/task-001/logs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: doors.tasks.open_followers == 1)
            assert await doors.stop() < limits.SHUTDOWN_SECONDS
            stuck.close()
            plain.close()

    asyncio.run(scene())


def test_an_idle_server_stops_at_once(open_doors):
    async def scene():
        async with open_doors() as doors:
            assert await doors.stop() < 1

    asyncio.run(scene())


def test_an_address_that_is_taken_is_named():
    held = bind("127.0.0.1", 0)
    port = held[0].getsockname()[1]
    held[0].listen()
    try:
        with pytest.raises(AddressError, match=f"port {port}"):
            bind("127.0.0.1", port)
        # An address for documentation, which no machine has.
        with pytest.raises(AddressError, match=r"192\.0\.2\.1"):
            bind("192.0.2.1", 0)
        with pytest.raises(AddressError, match=r"--ws-port \(SANDBOX_WS_PORT, server\.ws_port .*--host"):
            bind("127.0.0.1", port, "ws_port")
    finally:
        for one in held:
            one.close()
