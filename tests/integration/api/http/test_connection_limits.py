"""Whoever opens connections without an end, or requests with one token, keeps nobody else out."""

import asyncio
import contextlib
import select
import socket

import httpx
import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.auth import authenticator
from sandbox.api.http import connection_limits

SENT = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\n",
    "a request": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a wrong token": b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\n\r\n",
    "a body that does not come": b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    "no interest in answers": b"GET /assets/htmx.min.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200,
}


def as_vera(doors, **options):
    return httpx.AsyncClient(base_url=doors.http, timeout=10, headers={"Authorization": "Bearer vera"}, **options)


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
def test_connections_of_strangers_are_bounded_and_those_who_are_known_stay(open_doors, until, monkeypatch, sent):
    monkeypatch.setattr(connection_limits, "UNAUTHENTICATED_CONNECTIONS_MAX", 20)

    async def scene():
        async with open_doors(FakeAccess(vera="viewer")) as doors, as_vera(doors) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            async with client.stream("GET", "/api/v1/tasks/task-001/logs?follow=true") as following:
                opened = [socket.create_connection(("127.0.0.1", doors.port)) for _ in range(60)]
                for each in opened:
                    await asyncio.get_running_loop().run_in_executor(None, send_some, each, sent)
                await until(lambda: sum(map(is_cut, opened)) >= 40)
                assert (await client.get("/api/v1/tasks/task-001")).status_code == 200
                doors.tasks.tell("task-001", *TO_COMPLETED)
                assert "event: end" in [line async for line in following.aiter_lines()]
            for each in opened:
                each.close()

    asyncio.run(scene())


def send_some(client: socket.socket, sent: bytes) -> None:
    client.settimeout(1)
    with contextlib.suppress(OSError):
        client.sendall(sent)


def is_cut(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


def test_one_token_is_answered_on_so_many_requests_at_once(open_doors, until, monkeypatch):
    monkeypatch.setattr(authenticator, "REQUESTS_AT_ONCE_MAX", 3)

    async def scene():
        async with open_doors(FakeAccess(vera="viewer", otto="operator")) as doors, as_vera(doors) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            following = [asyncio.create_task(client.get("/api/v1/tasks/task-001/logs?follow=true")) for _ in range(3)]
            await until(lambda: doors.open_streams("logs") == 3)
            refused = await client.get("/api/v1/tasks")
            assert (refused.status_code, refused.json()["error"]) == (429, "rate_limit_exceeded")
            otto = await client.get("/api/v1/tasks", headers={"Authorization": "Bearer otto"})
            assert otto.status_code == 200
            doors.tasks.tell("task-001", *TO_COMPLETED)
            await asyncio.gather(*following)
            assert (await client.get("/api/v1/tasks")).status_code == 200

    asyncio.run(scene())
