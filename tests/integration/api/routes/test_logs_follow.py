"""Followed logs on real connections: live events, keep-alive, disconnects and shutdown."""

import asyncio
import json

import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING, FakeTasks
from sandbox.api import streaming_response
from sandbox.interfaces.server_services import TaskNotFoundError
from sandbox.model import events as e
from sandbox.model.wire.event_conversion import current_state_event

LOGS_PATH = "/api/v1/tasks/task-001/logs?follow=true"


async def events(response):
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_follow_streams_events_live_until_the_end(running_api):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001")
        async with client.stream("GET", LOGS_PATH) as response:
            received = events(response)
            assert (await anext(received))["new_state"] == "pending"
            api.tasks.record("task-001", *TO_RUNNING, e.Output.from_bytes("stdout", b"hello\n"))
            assert [(await anext(received))["seq"] for _ in range(5)] == [2, 3, 4, 5, 6]
            api.tasks.record("task-001", *TO_COMPLETED)
            assert [event["type"] async for event in received] == ["state_change", "state_change", "end"]


@pytest.mark.parametrize("query", ["?follow=true", ""])
async def test_stream_of_a_task_that_is_deleted_in_the_meantime_is_cut_off(running_api, monkeypatch, caplog, query):
    """If the response ended normally, the log would look complete."""

    async def recorded_events(self, task_id, *, after=0):
        yield current_state_event(self.entries[task_id].task)
        raise TaskNotFoundError(task_id)

    caplog.set_level("INFO")
    monkeypatch.setattr(FakeTasks, "recorded_events", recorded_events)
    monkeypatch.setattr(FakeTasks, "follow", recorded_events)
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get(f"/api/v1/tasks/task-001/logs{query}")
        async with connect(api.ws("?task_id=task-001")) as socket:
            assert json.loads(await socket.recv())["new_state"] == "completed"
            with pytest.raises(ConnectionClosedError, match="The task was deleted"):
                await socket.recv()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
    assert "A stream was cut off: the task was deleted" in caplog.messages


async def test_idle_stream_sends_keep_alive_comments(running_api, monkeypatch):
    monkeypatch.setattr(streaming_response, "KEEP_ALIVE_INTERVAL_SECONDS", 0.02)
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001")
        async with client.stream("GET", LOGS_PATH) as response:
            comments = 0
            async for line in response.aiter_lines():
                comments += line == ": keep-alive"
                if comments == 2:
                    break


async def test_disconnected_stream_is_detected_immediately(running_api, wait_until):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001")
        async with client.stream("GET", LOGS_PATH):
            await wait_until(lambda: api.tasks.open_followers == 1)
        await wait_until(lambda: api.tasks.open_followers == 0)


async def test_wait_is_cancelled_when_its_client_disconnects(running_api, wait_until):
    def has_pending_wait():
        return any("FakeTasks.wait" in str(task.get_coro()) for task in asyncio.all_tasks())

    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001")
        request = asyncio.create_task(client.get("/api/v1/tasks/task-001/wait?timeout=600"))
        await wait_until(has_pending_wait)
        request.cancel()
        await wait_until(lambda: not has_pending_wait())


async def test_oversized_body_is_rejected_with_and_without_content_length(running_api):
    async def chunks():
        for _ in range(40):
            yield b"x" * 100_000

    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        for content in (b"x" * 4_000_000, chunks()):
            response = await client.post("/api/v1/tasks", content=content)
            assert (response.status_code, response.json()["error"]) == (413, "payload_too_large")
        assert (await client.get("/api/health")).status_code == 200


async def test_head_response_has_no_body(running_api):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http) as client:
        api.tasks.add("task-001")
        for path in ("/api/v1/tasks/task-001", LOGS_PATH, "/api/v1/tasks/task-001/logs"):
            for _ in range(2):
                response = await client.head(path)
                assert (response.status_code, response.content) == (200, b"")


async def test_ipv4_and_ipv6_share_one_port(running_api):
    async with running_api() as api, httpx2.AsyncClient() as client:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert (await client.get(f"http://{host}:{api.port}/api/health")).status_code == 200
