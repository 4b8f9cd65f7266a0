"""Shutdown closes streams within a bounded time, regardless of what the clients do."""

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import AsyncExitStack

import httpx2
import pytest
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_RUNNING
from sandbox.api.http import server
from sandbox.api.http.server import AddressError, bind
from sandbox.bootstrap.server import set_on_signals
from sandbox.model import events as e
from sandbox.model import fixed_limits

LOGS_PATH = "/api/v1/tasks/task-001/logs?follow=true"


async def test_shutdown_closes_twenty_streams_in_time(running_api, wait_until):
    async def read_to_the_end(client):
        async with client.stream("GET", LOGS_PATH) as response:
            return "".join([text async for text in response.aiter_text()])

    async def scenario():
        async with running_api() as api, AsyncExitStack() as stack:
            api.tasks.add("task-001", *TO_RUNNING)
            client = await stack.enter_async_context(httpx2.AsyncClient(base_url=api.http, timeout=10))
            # The test cannot observe when this request arrives, so it sends the request before all others.
            waiting = asyncio.create_task(client.get("/api/v1/tasks/task-001/wait"))
            logs = [asyncio.create_task(read_to_the_end(client)) for _ in range(10)]
            sockets = [await stack.enter_async_context(connect(api.ws("?task_id=task-001"))) for _ in range(5)]
            sockets += [await stack.enter_async_context(connect(api.ws())) for _ in range(5)]
            await wait_until(lambda: (api.count_open_streams("logs"), api.count_open_streams("websocket")) == (10, 10))
            await wait_until(lambda: api.tasks.open_followers == 1 and len(api.tasks.subscribers) == 5)
            with set_on_signals(api.shutting_down):
                started = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(api.serving, 10)
                assert time.monotonic() - started < fixed_limits.SHUTDOWN_TIMEOUT_SECONDS
            # The responses are complete but have no `end` event: the task continues, and clients may reconnect.
            for text in await asyncio.gather(*logs):
                assert "event: state_change" in text
                assert "event: end" not in text
            assert (await waiting).json()["state"] == "running"
            for stream in sockets:
                async for message in stream:
                    assert json.loads(message)["type"] != "end"
                assert stream.close_code in {1001, 1012}
            assert api.tasks.open_followers == 0
            with pytest.raises(httpx2.ConnectError):
                await client.get("/api/health")

    await scenario()


async def test_stalled_client_does_not_delay_shutdown(running_api, wait_until):
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        for number in range(300):
            api.tasks.record("task-001", e.Output.from_bytes("stdout", b"%d" % number + b"x" * 100_000))
        stalled = socket.create_connection(("127.0.0.1", api.port))
        stalled.sendall(f"GET {LOGS_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        plain = socket.create_connection(("127.0.0.1", api.port))
        plain.sendall(b"GET /api/v1/tasks/task-001/logs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await wait_until(lambda: api.tasks.open_followers == 1)
        assert await api.stop() < fixed_limits.SHUTDOWN_TIMEOUT_SECONDS
        stalled.close()
        plain.close()


async def test_responses_cut_off_by_a_shutdown_are_not_errors(running_api, wait_until, monkeypatch, caplog):
    """Many clients read slowly. A traceback for each of them would fill the log."""
    monkeypatch.setattr(server, "GRACEFUL_SHUTDOWN_SECONDS", 1)
    async with running_api() as api, AsyncExitStack() as stack:
        api.tasks.add("task-001", *TO_RUNNING)
        for number in range(300):
            api.tasks.record("task-001", e.Output.from_bytes("stdout", b"%d" % number + b"x" * 100_000))
        for _ in range(10):
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", api.port)))
            plain.sendall(b"GET /api/v1/tasks/task-001/logs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        path, key = "/api/v1/tasks/stream?task_id=task-001&after=0", "dGhlIHNhbXBsZSBub25jZQ=="
        upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
        events = stack.enter_context(socket.create_connection(("127.0.0.1", api.websocket_port)))
        events.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n\r\n".encode())
        waiting = stack.enter_context(socket.create_connection(("127.0.0.1", api.port)))
        waiting.sendall(b"GET /api/v1/tasks/task-001/wait?timeout=600 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await wait_until(lambda: api.count_open_streams("websocket") == 1)
        await wait_until(lambda: len(_open_responses()) == 12)
        assert await api.stop() < fixed_limits.SHUTDOWN_TIMEOUT_SECONDS
        assert not _open_responses()
    assert "graceful shutdown exceeded" in caplog.text
    assert not [record.message for record in caplog.records if record.exc_info]


def _open_responses():
    return [task for task in asyncio.all_tasks() if "run_asgi" in str(task.get_coro())]


async def test_idle_server_stops_immediately(running_api):
    async with running_api() as api:
        assert await api.stop() < 1


def test_address_error_names_the_address_and_port():
    listeners = bind("127.0.0.1", 0)
    port = listeners[0].getsockname()[1]
    listeners[0].listen()
    try:
        with pytest.raises(AddressError, match=f"port {port}"):
            bind("127.0.0.1", port)
        # A documentation address (TEST-NET-1), which no machine has.
        with pytest.raises(AddressError, match=r"192\.0\.2\.1"):
            bind("192.0.2.1", 0)
        with pytest.raises(AddressError, match=r"--ws-port \(SANDBOX_WS_PORT, server\.ws_port .*--host"):
            bind("127.0.0.1", port, "ws_port")
    finally:
        for listener in listeners:
            listener.close()
