"""Connections and concurrent requests are limited; other clients are not affected."""

import asyncio
import contextlib
import http.client
import select
import socket

import httpx2
import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api import client_limits
from sandbox.api.http import connections

PAYLOADS = {
    "nothing": b"",
    "partial head": b"GET / HTTP/1.1\r\n",
    "request": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "wrong token": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n\r\n",
    "missing body": b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    "unread responses": b"GET /assets/htmx.min.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200,
}


def viewer_client(api, **options):
    return httpx2.AsyncClient(base_url=api.http, timeout=10, headers={"Authorization": "Bearer vera"}, **options)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
async def test_unauthenticated_connections_are_limited(running_api, wait_until, monkeypatch, payload):
    monkeypatch.setattr(connections, "UNAUTHENTICATED_CONNECTIONS_MAX", 20)
    async with running_api(FakeTokenStore(vera="viewer")) as api, viewer_client(api) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        async with client.stream("GET", "/api/v1/tasks/task-001/logs?follow=true") as stream:
            sockets = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(60)]
            for each in sockets:
                await asyncio.get_running_loop().run_in_executor(None, send_ignoring_errors, each, payload)
            await wait_until(lambda: sum(map(is_closed, sockets)) >= 40)
            assert (await client.get("/api/v1/tasks/task-001")).status_code == 200
            api.tasks.record("task-001", *TO_COMPLETED)
            assert "event: end" in [line async for line in stream.aiter_lines()]
        for each in sockets:
            each.close()


AUTHENTICATED_REQUEST = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer vera\r\n\r\n"


async def test_idle_connections_of_users_stay_open_during_a_flood_of_other_connections(
    running_api, wait_until, monkeypatch
):
    monkeypatch.setattr(connections, "UNAUTHENTICATED_CONNECTIONS_MAX", 20)
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        user = await connect_idle_user(api.port)
        strangers = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(60)]
        await wait_until(lambda: sum(map(is_closed, strangers)) >= 40)
        assert not is_closed(user)
        assert await asyncio.to_thread(get_tasks, user)
        for each in (user, *strangers):
            each.close()


async def test_number_of_idle_connections_of_users_is_limited(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(connections, "UNAUTHENTICATED_CONNECTIONS_MAX", 20)
    async with running_api(FakeTokenStore(vera="viewer")) as api:
        users = [await connect_idle_user(api.port) for _ in range(25)]
        await wait_until(lambda: [*map(is_closed, users)] == [True] * 5 + [False] * 20)
        assert await asyncio.to_thread(get_tasks, users[5])
        for each in users:
            each.close()


async def connect_idle_user(port: int) -> socket.socket:
    """Return a connection on which a request with a valid token has been answered."""
    user = socket.create_connection(("127.0.0.1", port), timeout=10)
    assert await asyncio.to_thread(get_tasks, user)
    return user


def get_tasks(user: socket.socket) -> bool:
    """Send a request and read the whole response; return whether it succeeded."""
    user.sendall(AUTHENTICATED_REQUEST)
    response = http.client.HTTPResponse(user)
    response.begin()
    response.read()
    return response.status == 200


def send_ignoring_errors(client: socket.socket, payload: bytes) -> None:
    client.settimeout(1)
    with contextlib.suppress(OSError):
        client.sendall(payload)


def is_closed(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


async def test_concurrent_requests_are_limited_per_token(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(client_limits, "CONCURRENT_REQUESTS_MAX", 3)
    async with running_api(FakeTokenStore(vera="viewer", otto="operator")) as api, viewer_client(api) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        streams = [asyncio.create_task(client.get("/api/v1/tasks/task-001/logs?follow=true")) for _ in range(3)]
        await wait_until(lambda: api.count_open_streams("logs") == 3)
        rejected = await client.get("/api/v1/tasks")
        assert (rejected.status_code, rejected.json()["error"]) == (429, "rate_limit_exceeded")
        other_response = await client.get("/api/v1/tasks", headers={"Authorization": "Bearer otto"})
        assert other_response.status_code == 200
        api.tasks.record("task-001", *TO_COMPLETED)
        await asyncio.gather(*streams)
        assert (await client.get("/api/v1/tasks")).status_code == 200
