"""If a token is revoked while a request that uses it is arriving or waiting, the request changes nothing."""

import asyncio

import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication

MANIFEST = b"""
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it.}
"""
REQUESTS = [
    ("POST", "/api/v1/tasks", MANIFEST, 202),
    ("POST", "/api/v1/tasks?dry_run=true", MANIFEST, 200),
    ("DELETE", "/api/v1/tasks/task-001", b'{"force": true}', 200),
]


def tokens() -> FakeTokenStore:
    return FakeTokenStore(olga="operator", otto="operator")


async def send_slowly(api, method: str, path: str, body: bytes, *, meanwhile) -> bytes:
    """Send a request, call `meanwhile` before the last byte of the body, and return the status line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer olga\r\n"
    kind = "application/json" if body.startswith(b"{") else "application/yaml"
    writer.write(f"{head}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
    await asyncio.sleep(0.2)
    meanwhile()
    writer.write(body[-1:])
    answer = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return answer


@pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
async def test_request_changes_nothing_once_its_token_is_revoked(running_api, method, path, body, status):
    token_store = tokens()
    async with running_api(token_store, clone_hosts=frozenset({"github.com"})) as api:
        api.tasks.add("task-001")
        answer = await send_slowly(api, method, path, body, meanwhile=lambda: token_store.roles.pop("olga"))
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert (list(api.tasks.entries), api.tasks.cancels) == (["task-001"], [])


@pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
async def test_request_is_served_if_another_token_is_revoked(running_api, method, path, body, status):
    token_store = tokens()
    async with running_api(token_store, clone_hosts=frozenset({"github.com"})) as api:
        api.tasks.add("task-001")
        answer = await send_slowly(api, method, path, body, meanwhile=lambda: token_store.roles.pop("otto"))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())


async def test_waiting_request_is_rejected_once_its_token_is_revoked(running_api, monkeypatch, caplog):
    monkeypatch.setattr(authentication, "RECHECK_INTERVAL_SECONDS", 0.1)

    async def scenario():
        token_store = tokens()
        async with running_api(token_store) as api:
            api.tasks.add("task-001")
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            path = "/api/v1/tasks/task-001/wait?timeout=0.5"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer olga\r\n\r\n".encode())
            await asyncio.sleep(0.2)
            del token_store.roles["olga"]
            assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 401 ")
            writer.close()

    await scenario()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
