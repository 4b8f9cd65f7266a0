"""Idle connections time out; slow clients and long streams do not."""

import asyncio
from types import SimpleNamespace

import h11
import httpx2
import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import connections

HEAD = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
PARTIAL_REQUESTS = {"nothing": b"", "partial head": HEAD[:30], "request and partial head": HEAD + HEAD[:30]}


@pytest.fixture
def short_head_timeout(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_SECONDS", 1.0)


@pytest.mark.usefixtures("short_head_timeout")
@pytest.mark.parametrize("payload", PARTIAL_REQUESTS.values(), ids=PARTIAL_REQUESTS)
async def test_incomplete_request_head_times_out(running_api, payload):
    async with running_api() as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(payload)
        try:
            # This timeout is shorter than the keep-alive timeout (5 s), which would also close the connection.
            response = await asyncio.wait_for(reader.read(), 4)
        except ConnectionResetError:
            response = None
        writer.close()
        assert payload.count(b"\r\n\r\n") == 0 or response is None or b" 200 " in response


@pytest.mark.usefixtures("short_head_timeout")
async def test_slow_request_and_long_stream_do_not_time_out(running_api):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=30) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        async with client.stream("GET", "/api/v1/tasks/task-001/logs?follow=true") as stream:
            for _ in range(6):
                reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
                for index in range(0, len(HEAD), 10):
                    writer.write(HEAD[index : index + 10])
                    await asyncio.sleep(0.05)
                assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
                writer.close()
            api.tasks.record("task-001", *TO_COMPLETED)
            lines = [line async for line in stream.aiter_lines()]
        assert "event: end" in lines


def test_connection_with_unsent_data_is_not_aborted():
    timers, aborts, buffered_bytes = [], [], [4096, 0]
    connection = connections.HttpProtocol.__new__(connections.HttpProtocol)
    connection.loop = SimpleNamespace(call_later=lambda seconds, call: timers.append((seconds, call)))
    connection.conn = SimpleNamespace(their_state=h11.IDLE)
    connection.transport = SimpleNamespace(
        get_write_buffer_size=lambda: buffered_bytes.pop(0), abort=lambda: aborts.append("aborted")
    )
    connection._update_head_timer()
    timers.pop()[1]()
    assert aborts == []
    timers.pop()[1]()
    assert (aborts, timers) == (["aborted"], [])
