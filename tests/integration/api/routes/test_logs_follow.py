"""Followers on real connections: they hear what happens as it happens, leave, come back, and are sent home."""

import asyncio
import json

import httpx

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.streaming import response as streaming_response
from sandbox.model import events as e

LOGS = "/api/v1/tasks/task-001/logs?follow=true"


async def events(response):
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_a_follower_hears_of_things_as_they_happen_and_of_the_end(open_doors):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            doors.tasks.add("task-001")
            async with client.stream("GET", LOGS) as response:
                told = events(response)
                assert (await anext(told))["new_state"] == "pending"
                doors.tasks.tell("task-001", *TO_RUNNING, e.Output.from_bytes("stdout", b"hello\n"))
                assert [(await anext(told))["seq"] for _ in range(5)] == [2, 3, 4, 5, 6]
                doors.tasks.tell("task-001", *TO_COMPLETED)
                assert [frame["type"] async for frame in told] == ["state_change", "state_change", "end"]

    asyncio.run(scene())


def test_a_silent_stream_is_kept_alive(open_doors, monkeypatch):
    monkeypatch.setattr(streaming_response, "KEEP_ALIVE_SECONDS", 0.02)

    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            doors.tasks.add("task-001")
            async with client.stream("GET", LOGS) as response:
                comments = 0
                async for line in response.aiter_lines():
                    comments += line == ": keep-alive"
                    if comments == 2:
                        break

    asyncio.run(scene())


def test_who_leaves_is_noticed_at_once(open_doors, until):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            doors.tasks.add("task-001")
            async with client.stream("GET", LOGS):
                await until(lambda: doors.tasks.open_followers == 1)
            await until(lambda: doors.tasks.open_followers == 0)

    asyncio.run(scene())


def test_a_wait_is_not_left_behind_by_who_leaves(open_doors, until):
    def is_waited_for():
        return any("FakeTasks.wait" in str(task.get_coro()) for task in asyncio.all_tasks())

    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            doors.tasks.add("task-001")
            asking = asyncio.create_task(client.get("/api/v1/tasks/task-001/wait?timeout=600"))
            await until(is_waited_for)
            asking.cancel()
            await until(lambda: not is_waited_for())

    asyncio.run(scene())


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(open_doors):
    async def chunks():
        for _ in range(40):
            yield b"x" * 100_000

    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            for content in (b"x" * 4_000_000, chunks()):
                answer = await client.post("/api/v1/tasks", content=content)
                assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")
            assert (await client.get("/api/health")).status_code == 200

    asyncio.run(scene())


def test_head_over_the_wire_has_no_body(open_doors):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http) as client:
            doors.tasks.add("task-001")
            for path in ("/api/v1/tasks/task-001", LOGS, "/api/v1/tasks/task-001/logs"):
                for _ in range(2):
                    answer = await client.head(path)
                    assert (answer.status_code, answer.content) == (200, b"")

    asyncio.run(scene())


def test_ipv4_and_ipv6_answer_on_one_port(open_doors):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient() as client:
            for host in ("127.0.0.1", "[::1]", "localhost"):
                assert (await client.get(f"http://{host}:{doors.port}/api/health")).status_code == 200

    asyncio.run(scene())
