"""What a token does not read holds a bounded part of the server's memory; who reads gets everything."""

import asyncio
import hashlib
import os
import socket
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from websockets.asyncio.client import connect

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.model import events as e
from sandbox.model.events import Artifact
from sandbox.system import memory_share

LIST = "/api/v1/tasks/task-001/artifacts"
STREAM = "/api/v1/tasks/stream"
LOGS = "/api/v1/tasks/task-001/logs"
MOST = 4 * 1024 * 1024
VERA, OTTO = ({"Authorization": f"Bearer {name}"} for name in ("vera", "otto"))
MUCH = [e.Output.from_bytes("stdout", os.urandom(30_000).hex().encode() + b"\n") for _ in range(100)]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(memory_share, "RESPONSE_BYTES_MAX", MOST)


def keep_many(doors, file):
    """Artifacts whose list has a good megabyte, and one that is a file."""
    doors.tasks.add("task-001", *TO_RUNNING)
    for number in range(3000):
        name = f"{number}-{'x' * 100}"
        doors.tasks.keep("task-001", Artifact(name, f"/{name}", 1, "text/plain", "sha256:" + "0" * 64), file)
    file.write_bytes(content := os.urandom(3_000_000))
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    doors.tasks.keep("task-001", Artifact("large", "large", len(content), "text/plain", checksum), file)
    return content


@contextmanager
def unread(port, path, token="vera", buffer_bytes=4096, headers=""):
    """A client that asks and reads nothing by itself, with a small buffer."""
    with socket.socket() as client:
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        client.connect(("127.0.0.1", port))
        headers = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n{headers}"
        client.sendall(f"GET {path} HTTP/1.1\r\n{headers}\r\n".encode())
        yield client


async def first_bytes(client, count=15):
    return await asyncio.to_thread(client.recv, count)


def doors_of_two(open_doors):
    return open_doors(FakeAccess(vera="viewer", otto="operator"))


def held(doors, token="vera"):
    return doors.context.authenticator._shares.of(token).memory.held_bytes


@pytest.mark.parametrize("path", [LIST, f"{LIST}/large"])
def test_responses_that_nobody_reads_are_bounded_and_a_further_one_is_refused(open_doors, until, tmp_path, path):
    async def scene():
        async with doors_of_two(open_doors) as doors, httpx.AsyncClient(base_url=doors.http, timeout=20) as client:
            keep_many(doors, tmp_path / "file")
            with ExitStack() as opened:
                asked = [opened.enter_context(unread(doors.port, path)) for _ in range(60)]
                answers = [await first_bytes(each) for each in asked]
                assert {answer[9:12] for answer in answers} == {b"200", b"429"}
                assert held(doors) <= MOST + 60 * 128 * 1024
                refused = await client.get(LIST, headers=VERA)
                assert (refused.status_code, refused.json()["error"]) == (429, "response_memory_exceeded")
                assert int(refused.headers["retry-after"]) > 0
                assert (await client.get(LIST, headers=OTTO)).status_code == 200
                assert (await client.get("/api/health")).status_code == 200
            await until(lambda: held(doors) == 0)
            assert (await client.get(LIST, headers=VERA)).status_code == 200

    asyncio.run(scene())


def test_who_takes_nothing_for_long_is_closed_when_its_token_needs_the_memory(open_doors, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_share, "STALLED_SECONDS", 0.3)

    async def scene():
        async with doors_of_two(open_doors) as doors, httpx.AsyncClient(base_url=doors.http, timeout=20) as client:
            keep_many(doors, tmp_path / "file")
            with ExitStack() as opened:
                for each in [opened.enter_context(unread(doors.port, LIST)) for _ in range(10)]:
                    await first_bytes(each)
                await asyncio.sleep(0.5)
                assert (await client.get(LIST, headers=VERA)).status_code == 200

    asyncio.run(scene())


def test_a_slow_but_steady_client_gets_everything_beside_those_who_read_nothing(open_doors, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_share, "STALLED_SECONDS", 5.0)

    async def scene():
        async with doors_of_two(open_doors) as doors, httpx.AsyncClient(base_url=doors.http, timeout=20) as client:
            content = keep_many(doors, tmp_path / "file")
            with ExitStack() as opened:
                slow = opened.enter_context(unread(doors.port, f"{LIST}/large", buffer_bytes=128 * 1024))
                received = bytearray(await first_bytes(slow))
                for _ in range(20):
                    opened.enter_context(unread(doors.port, LIST))
                while not received.endswith(content):
                    part = await first_bytes(slow, 64 * 1024)
                    assert part
                    received += part
                    await asyncio.sleep(0.05)
                    await client.get("/api/v1/tasks", headers=VERA)

    asyncio.run(scene())


def test_twenty_downloads_at_once_are_all_whole(open_doors, tmp_path):
    async def scene():
        async with doors_of_two(open_doors) as doors, httpx.AsyncClient(base_url=doors.http, timeout=30) as client:
            content = keep_many(doors, tmp_path / "file")
            answers = await asyncio.gather(*(client.get(f"{LIST}/large", headers=VERA) for _ in range(20)))
            assert [answer.content == content for answer in answers] == [True] * 20
            assert held(doors) == 0

    asyncio.run(scene())


@pytest.mark.parametrize("path", [LOGS, f"{LOGS}?follow=true&after=0"])
def test_streams_that_nobody_reads_are_counted_and_end_the_count_with_them(open_doors, until, path):
    async def scene():
        async with doors_of_two(open_doors) as doors, httpx.AsyncClient(base_url=doors.http, timeout=20) as client:
            doors.tasks.add("task-001", *TO_RUNNING, *MUCH, *TO_COMPLETED)
            with ExitStack() as opened:
                for _ in range(20):
                    opened.enter_context(unread(doors.port, path))
                await until(lambda: held(doors) > MOST)
                assert (await client.get(LOGS, headers=VERA)).status_code == 429
                whole = await client.get(LOGS, headers=OTTO)
                assert whole.text.count("STDOUT") == len(MUCH)
            await until(lambda: held(doors) == 0)
            whole = await client.get(LOGS, headers=VERA)
            assert whole.text.count("STDOUT") == len(MUCH)

    asyncio.run(scene())


def test_a_websocket_that_nobody_reads_is_counted_and_one_that_reads_gets_everything(open_doors, until):
    async def scene():
        async with doors_of_two(open_doors) as doors:
            doors.tasks.add("task-001", *TO_RUNNING, *MUCH, *TO_COMPLETED)
            query = "?task_id=task-001&after=0"
            async with connect(doors.ws(query), additional_headers=VERA) as reading:
                received = [message async for message in reading]
            assert sum('"type":"output"' in message for message in received) == len(MUCH)
            await until(lambda: held(doors) == 0)
            upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            with ExitStack() as opened:
                path = f"{STREAM}?task_id=task-001&after=0"
                headers = f"{upgrade}Sec-WebSocket-Key: {'A' * 22}==\r\n"
                for _ in range(20):
                    opened.enter_context(unread(doors.stream_port, path, headers=headers))
                await until(lambda: held(doors) > MOST)
            await until(lambda: held(doors) == 0)

    asyncio.run(scene())


def test_bodies_that_do_not_come_take_the_memory_of_their_token_only(open_doors, until):
    async def scene():
        async with open_doors(FakeAccess(olga="operator", otto="operator")) as doors:
            submission = b"name: x", "/api/v1/tasks?dry_run=true"
            with ExitStack() as opened:
                for _ in range(20):
                    client = opened.enter_context(socket.create_connection(("127.0.0.1", doors.port)))
                    head = f"POST {submission[1]} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer olga\r\n"
                    client.sendall(f"{head}Content-Length: 1000000\r\n\r\nx".encode())
                await until(lambda: held(doors, "olga") > 0)
                assert held(doors, "olga") <= MOST
                async with httpx.AsyncClient(base_url=doors.http, headers=OTTO) as otto:
                    assert (await otto.post(submission[1], content=submission[0])).status_code == 400
            await until(lambda: held(doors, "olga") == 0)
            async with httpx.AsyncClient(base_url=doors.http, headers={"Authorization": "Bearer olga"}) as olga:
                assert (await olga.post(submission[1], content=submission[0])).status_code == 400

    asyncio.run(scene())
