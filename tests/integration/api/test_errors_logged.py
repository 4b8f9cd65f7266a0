"""The server logs errors and token ids together with the request id of the response."""

import asyncio
import logging

import httpx2
import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.primitives.log_context import REQUEST_ID, TASK_ID, TOKEN_ID


@pytest.fixture
def logged():
    """The log records, with their request ids and task ids."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            record.token_id = TOKEN_ID.get()
            lines.append((record, REQUEST_ID.get(), TASK_ID.get()))

    handler, levels = Handler(), {name: logging.getLogger(name).level for name in ("", "sandbox")}
    logging.getLogger().addHandler(handler)
    logging.getLogger("sandbox").setLevel(logging.INFO)
    yield lines
    logging.getLogger().removeHandler(handler)
    logging.getLogger("sandbox").setLevel(levels["sandbox"])


async def test_internal_error_is_logged_with_its_request_id(running_api, logged):
    async def scenario():
        async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=10) as client:
            api.tasks.add("task-001")
            api.tasks.failure = RuntimeError("a bug")
            failed = await client.delete("/api/v1/tasks/task-001", headers={"x-request-id": "mine"})
            succeeded = await client.get("/api/v1/tasks/task-001")
            return failed, succeeded

    failed, succeeded = await scenario()
    assert (failed.status_code, succeeded.status_code) == (500, 200)
    records = [(record, task_id) for record, request_id, task_id in logged if request_id == "mine"]
    assert [task_id for record, task_id in records if record.exc_info] == ["task-001"]
    assert [record.status for record, _ in records if hasattr(record, "status")] == [500]
    others = [record for record, request_id, _ in logged if request_id == succeeded.headers["x-request-id"]]
    assert [record.status for record in others] == [200]


async def test_requests_are_logged_with_their_token_id(running_api, logged):
    async def scenario():
        async with (
            running_api(FakeTokenStore(otto="operator", vera="viewer")) as api,
            httpx2.AsyncClient(base_url=api.http, timeout=10) as client,
        ):
            api.tasks.add("task-001")
            for token in ("otto", "vera", "nobody"):
                headers = {"authorization": f"Bearer {token}", "x-request-id": token}
                await client.get("/api/v1/tasks/task-001", headers=headers)
            headers = {"authorization": "Bearer vera", "x-request-id": "vera-again"}
            await client.delete("/api/v1/tasks/task-001", headers=headers)

    await scenario()
    requests = {
        request_id: (record.status, record.token_id) for record, request_id, _ in logged if hasattr(record, "status")
    }
    assert requests == {
        "otto": (200, "otto"),
        "vera": (200, "vera"),
        "nobody": (401, None),
        "vera-again": (403, "vera"),
    }


async def test_long_path_is_logged_in_part(running_api, logged):
    async with (
        running_api(FakeTokenStore(vera="viewer")) as api,
        httpx2.AsyncClient(base_url=api.http, timeout=10) as client,
    ):
        await client.get(f"/{'a' * 5000}", headers={"authorization": "Bearer vera"})
    assert [record.path for record, _, _ in logged if hasattr(record, "path")] == [f"/{'a' * 511}"]


async def test_token_id_is_reset_between_requests_of_a_connection(running_api, logged):
    """After a large body, the rest of a keep-alive connection is read in the context of the first request."""

    async def scenario():
        async with running_api(FakeTokenStore(otto="operator")) as api:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            body = b"x" * 900_000
            for request_head in (
                f"POST /api/v1/tasks?dry_run=true HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer otto\r\n"
                f"X-Request-Id: large\r\nContent-Length: {len(body)}\r\n\r\n",
                "GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: next\r\n\r\n",
            ):
                writer.write(request_head.encode() + (body if "large" in request_head else b""))
                response = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                length = int(response.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await asyncio.wait_for(reader.readexactly(length), 10)
            writer.close()

    await scenario()
    requests = {
        request_id: (record.status, record.token_id) for record, request_id, _ in logged if hasattr(record, "status")
    }
    assert requests == {"large": (400, "otto"), "next": (401, None)}


async def test_server_without_tokens_logs_no_token_id(running_api, logged):
    async def scenario():
        async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=10) as client:
            await client.get("/api/v1/tasks")

    await scenario()
    assert [record.token_id for record, _, _ in logged if hasattr(record, "status")] == [None]
