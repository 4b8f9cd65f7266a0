"""Who sends no request, or half of one, is let go in a bounded time; who is slow, and who follows for long, is not."""

import asyncio
from types import SimpleNamespace

import h11
import httpx
import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.http import protocols

HEAD = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALVES = {"nothing": b"", "half a head": HEAD[:30], "an answered request and half a head": HEAD + HEAD[:30]}


@pytest.fixture
def in_haste(monkeypatch):
    monkeypatch.setattr(protocols, "HEAD_TIMEOUT_SECONDS", 1.0)


@pytest.mark.usefixtures("in_haste")
@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_who_sends_no_whole_head_is_let_go(open_doors, sent):
    async def scene():
        async with open_doors() as doors:
            reader, writer = await asyncio.open_connection("127.0.0.1", doors.port)
            writer.write(sent)
            try:
                # The server's wait for the next request on a connection ends after five seconds.
                answer = await asyncio.wait_for(reader.read(), 4)
            except ConnectionResetError:
                answer = None
            writer.close()
            assert sent.count(b"\r\n\r\n") == 0 or answer is None or b" 200 " in answer

    asyncio.run(scene())


@pytest.mark.usefixtures("in_haste")
def test_a_slow_client_is_answered_and_a_follower_told_to_the_end(open_doors):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=30) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            async with client.stream("GET", "/api/v1/tasks/task-001/logs?follow=true") as following:
                for _ in range(6):
                    reader, writer = await asyncio.open_connection("127.0.0.1", doors.port)
                    for at in range(0, len(HEAD), 10):
                        writer.write(HEAD[at : at + 10])
                        await asyncio.sleep(0.05)
                    assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
                    writer.close()
                doors.tasks.tell("task-001", *TO_COMPLETED)
                told = [line async for line in following.aiter_lines()]
            assert "event: end" in told

    asyncio.run(scene())


def test_who_still_takes_an_answer_is_not_let_go():
    waits, aborts, behind = [], [], [4096, 0]
    connection = protocols.HttpProtocol.__new__(protocols.HttpProtocol)
    connection.loop = SimpleNamespace(call_later=lambda seconds, call: waits.append((seconds, call)))
    connection.conn = SimpleNamespace(their_state=h11.IDLE)
    connection.transport = SimpleNamespace(
        get_write_buffer_size=lambda: behind.pop(0), abort=lambda: aborts.append("cut off")
    )
    connection._update_head_timer()
    waits.pop()[1]()
    assert aborts == []
    waits.pop()[1]()
    assert (aborts, waits) == (["cut off"], [])
