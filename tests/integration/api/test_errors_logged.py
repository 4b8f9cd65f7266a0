"""An answer 500 names a request id, and under this id the server's log tells what happened, and who asked."""

import asyncio
import logging

import httpx
import pytest

from doubles.fake_access import FakeAccess
from sandbox.system.log_context import REQUEST_ID, TASK_ID, TOKEN_ID


@pytest.fixture
def logged():
    """What was logged, with the ids of the work that it is about."""
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


def test_a_failure_inside_is_found_by_the_id_of_its_answer(open_doors, logged):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=10) as client:
            doors.tasks.add("task-001")
            doors.tasks.failure = RuntimeError("a bug")
            broken = await client.delete("/api/v1/tasks/task-001", headers={"x-request-id": "mine"})
            fine = await client.get("/api/v1/tasks/task-001")
            return broken, fine

    broken, fine = asyncio.run(scene())
    assert (broken.status_code, fine.status_code) == (500, 200)
    told = [(record, task_id) for record, request_id, task_id in logged if request_id == "mine"]
    assert [task_id for record, task_id in told if record.exc_info] == ["task-001"]
    assert [record.status for record, _ in told if hasattr(record, "status")] == [500]
    others = [record for record, request_id, _ in logged if request_id == fine.headers["x-request-id"]]
    assert [record.status for record in others] == [200]


def test_who_asked_is_told_by_the_id_of_the_token(open_doors, logged):
    async def scene():
        async with (
            open_doors(FakeAccess(otto="operator", vera="viewer")) as doors,
            httpx.AsyncClient(base_url=doors.http, timeout=10) as client,
        ):
            doors.tasks.add("task-001")
            for holder in ("otto", "vera", "nobody"):
                headers = {"authorization": f"Bearer {holder}", "x-request-id": holder}
                await client.get("/api/v1/tasks/task-001", headers=headers)
            headers = {"authorization": "Bearer vera", "x-request-id": "vera-again"}
            await client.delete("/api/v1/tasks/task-001", headers=headers)

    asyncio.run(scene())
    asked = {
        request_id: (record.status, record.token_id) for record, request_id, _ in logged if hasattr(record, "status")
    }
    assert asked == {
        "otto": (200, "otto"),
        "vera": (200, "vera"),
        "nobody": (401, None),
        "vera-again": (403, "vera"),
    }


def test_the_next_one_on_a_connection_is_not_taken_for_the_one_before(open_doors, logged):
    """A proxy keeps one for many; a large body makes the rest of a connection be read in its request's context."""

    async def scene():
        async with open_doors(FakeAccess(otto="operator")) as doors:
            reader, writer = await asyncio.open_connection("127.0.0.1", doors.port)
            body = b"x" * 900_000
            for head in (
                f"POST /api/v1/tasks?dry_run=true HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer otto\r\n"
                f"X-Request-Id: large\r\nContent-Length: {len(body)}\r\n\r\n",
                "GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: next\r\n\r\n",
            ):
                writer.write(head.encode() + (body if "large" in head else b""))
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await asyncio.wait_for(reader.readexactly(length), 10)
            writer.close()

    asyncio.run(scene())
    asked = {
        request_id: (record.status, record.token_id) for record, request_id, _ in logged if hasattr(record, "status")
    }
    assert asked == {"large": (400, "otto"), "next": (401, None)}


def test_a_server_without_tokens_names_none(open_doors, logged):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=10) as client:
            await client.get("/api/v1/tasks")

    asyncio.run(scene())
    assert [record.token_id for record, _, _ in logged if hasattr(record, "status")] == [None]
