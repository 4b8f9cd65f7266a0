"""The unread responses for one token use a bounded amount of the server's memory; clients that read get everything."""

import asyncio
import hashlib
import os
import socket
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.primitives import fair_client_shares

ARTIFACT_LIST_PATH = "/api/v1/tasks/task-001/artifacts"
STREAM_PATH = "/api/v1/tasks/stream"
LOGS_PATH = "/api/v1/tasks/task-001/logs"
LIMIT_BYTES = 4 * 1024 * 1024
VIEWER_HEADERS, OPERATOR_HEADERS = ({"Authorization": f"Bearer {name}"} for name in ("vera", "otto"))
LARGE_OUTPUT = [e.Output.from_bytes("stdout", os.urandom(30_000).hex().encode() + b"\n") for _ in range(100)]


@pytest.fixture(autouse=True)
def _low_memory_limit(monkeypatch):
    monkeypatch.setattr(fair_client_shares, "RESPONSES_BYTES_MAX", LIMIT_BYTES)


def store_many_artifacts(api, file):
    """Add artifacts whose list exceeds a megabyte, and one with a real file; return the content of the file."""
    api.tasks.add("task-001", *TO_RUNNING)
    for number in range(3000):
        name = f"{number}-{'x' * 100}"
        api.tasks.add_artifact("task-001", Artifact(name, f"/{name}", 1, "text/plain", "sha256:" + "0" * 64), file)
    file.write_bytes(content := os.urandom(3_000_000))
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    api.tasks.add_artifact("task-001", Artifact("large", "large", len(content), "text/plain", checksum), file)
    return content


@contextmanager
def connect_without_reading(port, path, token="vera", buffer_bytes=4096, headers=""):
    """Connect a client that has a small buffer, sends a request and does not read the response."""
    with socket.socket() as client:
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        client.connect(("127.0.0.1", port))
        headers = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n{headers}"
        client.sendall(f"GET {path} HTTP/1.1\r\n{headers}\r\n".encode())
        yield client


async def first_bytes(client, count=15):
    return await asyncio.to_thread(client.recv, count)


def api_with_two_tokens(running_api):
    return running_api(FakeTokenStore(vera="viewer", otto="operator"))


def reserved_bytes(api, token="vera"):
    return api.context.admission.client_limits._shares.of(token).memory.reserved_bytes


@pytest.mark.parametrize("path", [ARTIFACT_LIST_PATH, f"{ARTIFACT_LIST_PATH}/large"])
async def test_unread_responses_are_limited(running_api, wait_until, tmp_path, path):
    async with api_with_two_tokens(running_api) as api, httpx2.AsyncClient(base_url=api.http, timeout=20) as client:
        store_many_artifacts(api, tmp_path / "file")
        with ExitStack() as opened:
            clients = [opened.enter_context(connect_without_reading(api.port, path)) for _ in range(60)]
            status_lines = [await first_bytes(each) for each in clients]
            assert {status_line[9:12] for status_line in status_lines} == {b"200", b"429"}
            assert reserved_bytes(api) <= LIMIT_BYTES + 60 * 128 * 1024
            refused = await client.get(ARTIFACT_LIST_PATH, headers=VIEWER_HEADERS)
            assert (refused.status_code, refused.json()["error"]) == (429, "response_memory_exceeded")
            assert int(refused.headers["retry-after"]) > 0
            assert (await client.get(ARTIFACT_LIST_PATH, headers=OPERATOR_HEADERS)).status_code == 200
            assert (await client.get("/api/health")).status_code == 200
        await wait_until(lambda: reserved_bytes(api) == 0)
        assert (await client.get(ARTIFACT_LIST_PATH, headers=VIEWER_HEADERS)).status_code == 200


async def test_stalled_connection_is_closed_when_its_token_needs_memory(running_api, tmp_path, monkeypatch):
    monkeypatch.setattr(fair_client_shares, "STALLED_SECONDS", 0.3)
    async with api_with_two_tokens(running_api) as api, httpx2.AsyncClient(base_url=api.http, timeout=20) as client:
        store_many_artifacts(api, tmp_path / "file")
        with ExitStack() as opened:
            for each in [
                opened.enter_context(connect_without_reading(api.port, ARTIFACT_LIST_PATH)) for _ in range(10)
            ]:
                await first_bytes(each)
            await asyncio.sleep(0.5)
            assert (await client.get(ARTIFACT_LIST_PATH, headers=VIEWER_HEADERS)).status_code == 200


async def test_slow_steady_client_receives_everything(running_api, tmp_path, monkeypatch):
    monkeypatch.setattr(fair_client_shares, "STALLED_SECONDS", 5.0)
    async with api_with_two_tokens(running_api) as api, httpx2.AsyncClient(base_url=api.http, timeout=20) as client:
        content = store_many_artifacts(api, tmp_path / "file")
        with ExitStack() as opened:
            slow = opened.enter_context(
                connect_without_reading(api.port, f"{ARTIFACT_LIST_PATH}/large", buffer_bytes=128 * 1024)
            )
            received = bytearray(await first_bytes(slow))
            for _ in range(20):
                opened.enter_context(connect_without_reading(api.port, ARTIFACT_LIST_PATH))
            while not received.endswith(content):
                part = await first_bytes(slow, 64 * 1024)
                assert part
                received += part
                await asyncio.sleep(0.05)
                await client.get("/api/v1/tasks", headers=VIEWER_HEADERS)


async def test_parallel_downloads_are_complete(running_api, tmp_path):
    async with api_with_two_tokens(running_api) as api, httpx2.AsyncClient(base_url=api.http, timeout=30) as client:
        content = store_many_artifacts(api, tmp_path / "file")
        responses = await asyncio.gather(
            *(client.get(f"{ARTIFACT_LIST_PATH}/large", headers=VIEWER_HEADERS) for _ in range(20))
        )
        assert [response.content == content for response in responses] == [True] * 20
        assert reserved_bytes(api) == 0


@pytest.mark.parametrize("path", [LOGS_PATH, f"{LOGS_PATH}?follow=true&after=0"])
async def test_unread_streams_use_response_memory_until_they_end(running_api, wait_until, path):
    async with api_with_two_tokens(running_api) as api, httpx2.AsyncClient(base_url=api.http, timeout=20) as client:
        api.tasks.add("task-001", *TO_RUNNING, *LARGE_OUTPUT, *TO_COMPLETED)
        with ExitStack() as opened:
            for _ in range(20):
                opened.enter_context(connect_without_reading(api.port, path))
            await wait_until(lambda: reserved_bytes(api) > LIMIT_BYTES)
            assert (await client.get(LOGS_PATH, headers=VIEWER_HEADERS)).status_code == 429
            whole = await client.get(LOGS_PATH, headers=OPERATOR_HEADERS)
            assert whole.text.count("STDOUT") == len(LARGE_OUTPUT)
        await wait_until(lambda: reserved_bytes(api) == 0)
        whole = await client.get(LOGS_PATH, headers=VIEWER_HEADERS)
        assert whole.text.count("STDOUT") == len(LARGE_OUTPUT)


async def test_unread_websocket_uses_response_memory(running_api, wait_until):
    async with api_with_two_tokens(running_api) as api:
        api.tasks.add("task-001", *TO_RUNNING, *LARGE_OUTPUT, *TO_COMPLETED)
        query = "?task_id=task-001&after=0"
        async with connect(api.ws(query), additional_headers=VIEWER_HEADERS) as reading:
            received = [message async for message in reading]
        assert sum('"type":"output"' in message for message in received) == len(LARGE_OUTPUT)
        await wait_until(lambda: reserved_bytes(api) == 0)
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        with ExitStack() as opened:
            path = f"{STREAM_PATH}?task_id=task-001&after=0"
            headers = f"{upgrade}Sec-WebSocket-Key: {'A' * 22}==\r\n"
            for _ in range(20):
                opened.enter_context(connect_without_reading(api.websocket_port, path, headers=headers))
            await wait_until(lambda: reserved_bytes(api) > LIMIT_BYTES)
        await wait_until(lambda: reserved_bytes(api) == 0)


async def test_unfinished_request_bodies_do_not_use_the_memory_of_other_tokens(running_api, wait_until):
    async with running_api(FakeTokenStore(olga="operator", otto="operator")) as api:
        submission = b"name: x", "/api/v1/tasks?dry_run=true"
        with ExitStack() as opened:
            for _ in range(20):
                client = opened.enter_context(socket.create_connection(("127.0.0.1", api.port)))
                head = f"POST {submission[1]} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer olga\r\n"
                client.sendall(f"{head}Content-Length: 1000000\r\n\r\nx".encode())
            await wait_until(lambda: reserved_bytes(api, "olga") > 0)
            assert reserved_bytes(api, "olga") <= LIMIT_BYTES
            async with httpx2.AsyncClient(base_url=api.http, headers=OPERATOR_HEADERS) as other_client:
                assert (await other_client.post(submission[1], content=submission[0])).status_code == 400
        await wait_until(lambda: reserved_bytes(api, "olga") == 0)
        async with httpx2.AsyncClient(base_url=api.http, headers={"Authorization": "Bearer olga"}) as operator_client:
            assert (await operator_client.post(submission[1], content=submission[0])).status_code == 400


async def test_submission_that_took_effect_is_never_answered_with_429(running_api, wait_until):
    manifest = b"""{"version": "1", "kind": "Task", "metadata": {"name": "x"}, "claude": {"prompt": "Do it."},
        "repository": {"url": "https://github.com/org/repo.git", "branch": "main"}}"""
    body = manifest.ljust(LIMIT_BYTES // 4)  # each submission uses half of the limit

    async def submit(port, is_last_byte_due):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer olga\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body[:-1])
        await is_last_byte_due.wait()
        writer.write(body[-1:])
        status_line = await asyncio.wait_for(reader.readline(), 20)
        writer.close()
        return status_line[9:12]

    token_store = FakeTokenStore(olga="operator", otto="operator")
    async with running_api(token_store, clone_hosts=frozenset({"github.com"})) as api:
        is_last_byte_due = asyncio.Event()
        submissions = [asyncio.create_task(submit(api.port, is_last_byte_due)) for _ in range(20)]
        await wait_until(lambda: reserved_bytes(api, "olga") == LIMIT_BYTES)
        is_last_byte_due.set()
        statuses = await asyncio.gather(*submissions)
        assert statuses.count(b"202") == len(api.tasks.entries) > 0
