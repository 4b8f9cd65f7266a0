"""Many follow one task: what happens is read and encoded once, and each is told everything exactly once."""

import asyncio
import json
import random

import httpx
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api.routes import logs
from sandbox.api.streaming import buffer
from sandbox.api.streaming import response as streaming_response
from sandbox.model import events as e

LOGS = "/api/v1/tasks/task-001/logs?follow=true"


async def follow(client, after, *, leaves_after=None):
    """The seqs of one connection."""
    seqs = []
    async with client.stream("GET", f"{LOGS}&after={after}") as response:
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                seqs.append(int(line[4:]))
                if leaves_after is not None and len(seqs) >= leaves_after:
                    break
    return seqs


async def follow_restlessly(client, last, chance):
    """The seqs of somebody who goes away and comes back until the end."""
    seqs = [0]
    while seqs[-1] != last:
        seqs += await follow(client, seqs[-1], leaves_after=chance.choice([1, 7, 60, None]))
    return seqs[1:]


def lines(first, count):
    return [e.Output.from_bytes("stdout", f"line {number}\n".encode()) for number in range(first, first + count)]


def test_each_has_everything_once_however_often_they_leave(open_doors, monkeypatch):
    # So small that who was away is behind the tail, and has the past read anew.
    monkeypatch.setattr(buffer, "BUFFER_BYTES_MAX", 20_000)
    monkeypatch.setattr(buffer, "HISTORY_BYTES_MAX", 20_000)
    monkeypatch.setattr(buffer, "_HISTORY_BATCH_BYTES", 7_000)

    async def scene():
        async with open_doors() as doors:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=doors.http, limits=limits, timeout=20) as client:
                doors.tasks.add("task-001", *TO_RUNNING)
                last = 5 + 600 + len(TO_COMPLETED) + 1
                chance = random.Random(7)
                steady = [asyncio.create_task(follow(client, 0)) for _ in range(4)]
                restless = [asyncio.create_task(follow_restlessly(client, last, chance)) for _ in range(6)]
                for number in range(30):
                    doors.tasks.tell("task-001", *lines(number * 20, 20))
                    await asyncio.sleep(0.01)
                doors.tasks.tell("task-001", *TO_COMPLETED)
                for seqs in await asyncio.gather(*steady, *restless):
                    assert seqs == list(range(1, last + 1))
            assert doors.tasks.open_followers == 0

    asyncio.run(scene())


def test_what_happens_is_encoded_once_and_goes_out_in_batches(open_doors, monkeypatch):
    encoded, sent, encode, take = [], [], logs._format_sse, streaming_response.Prefetcher.next_batch

    def counted(frame):
        encoded.append(frame["seq"])
        return encode(frame)

    async def batch(feed, idle_seconds):
        sent.append(found := await take(feed, idle_seconds))
        return found

    monkeypatch.setattr(logs, "_format_sse", counted)
    monkeypatch.setattr(streaming_response.Prefetcher, "next_batch", batch)

    async def scene():
        async with open_doors() as doors:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=doors.http, limits=limits, timeout=20) as client:
                doors.tasks.add("task-001", *TO_RUNNING)
                followers = [asyncio.create_task(follow(client, 0)) for _ in range(12)]
                async with asyncio.timeout(5):
                    while doors.open_streams("logs") < 12:
                        await asyncio.sleep(0.005)
                for number in range(50):
                    doors.tasks.tell("task-001", *lines(number * 20, 20))
                    await asyncio.sleep(0.001)
                doors.tasks.tell("task-001", *TO_COMPLETED)
                last = 5 + 1000 + len(TO_COMPLETED) + 1
                assert await asyncio.gather(*followers) == [list(range(1, last + 1))] * 12
                assert encoded == list(range(1, last + 1))
                assert len(sent) < 12 * 100

    asyncio.run(scene())


def test_what_is_kept_of_the_past_has_a_bound(monkeypatch):
    monkeypatch.setattr(buffer, "_HISTORY_BATCH_BYTES", 1000)
    monkeypatch.setattr(buffer, "HISTORY_BYTES_MAX", 5000)

    async def frames(after):
        for seq in range(after + 1, 101):
            yield {"type": "output", "seq": seq, "data": "x" * 100}

    async def scene():
        past, position, reads = buffer.HistoryCache(), 0, 0
        while position < 100:
            position, reads = (await past.load(frames(position), position)).last_seq, reads + 1
        assert reads == 34
        assert await past.load(frames(100), 100) is None
        kept = [position for position in range(101) if past.find(position)]
        assert kept == list(range(87, 100))

    asyncio.run(scene())


def test_what_was_missed_is_encoded_once_for_all_who_missed_it(open_doors, monkeypatch):
    monkeypatch.setattr(buffer, "BUFFER_BYTES_MAX", 20_000)
    encoded, encode = [], logs._format_sse

    def counted(frame):
        encoded.append(frame["seq"])
        return encode(frame)

    monkeypatch.setattr(logs, "_format_sse", counted)

    async def scene():
        async with open_doors() as doors:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=doors.http, limits=limits, timeout=20) as client:
                doors.tasks.add("task-001", *TO_RUNNING, *lines(0, 3000))
                followers = [asyncio.create_task(follow(client, after)) for after in [0] * 10 + [1500] * 10]
                async with asyncio.timeout(5):
                    while doors.open_streams("logs") < 20:
                        await asyncio.sleep(0.005)
                doors.tasks.tell("task-001", *TO_COMPLETED)
                last = 5 + 3000 + len(TO_COMPLETED) + 1
                told = await asyncio.gather(*followers)
                assert told == [list(range(1, last + 1))] * 10 + [list(range(1501, last + 1))] * 10
                # Who begins within a piece has its rest encoded alone; everything else is shared.
                assert len(encoded) < last + 10 * 1500

    asyncio.run(scene())


def test_each_has_a_filter_of_its_own(open_doors):
    async def told(doors, query):
        async with connect(doors.ws(f"?task_id=task-001&after=0{query}")) as socket:
            return [json.loads(message)["type"] async for message in socket]

    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            all_types = asyncio.create_task(told(doors, ""))
            output = asyncio.create_task(told(doors, "&filter=output"))
            metrics = asyncio.create_task(told(doors, "&filter=metrics"))
            async with asyncio.timeout(5):
                while doors.open_streams("websocket") != 3:
                    await asyncio.sleep(0.005)
            figures = e.Metrics(cpu_percent=12.5, memory_used_bytes=1024)
            doors.tasks.tell("task-001", *lines(0, 2), figures, *TO_COMPLETED)
            assert await output == ["output", "output", "end"]
            assert await metrics == ["metrics", "end"]
            assert await all_types == ["state_change"] * 5 + ["output", "output", "metrics"] + ["state_change"] * 2 + [
                "end"
            ]

    asyncio.run(scene())


def test_a_place_past_the_end_is_told_the_end(open_doors):
    async def scene():
        async with open_doors() as doors, httpx.AsyncClient(base_url=doors.http, timeout=10) as client:
            doors.tasks.add("task-001", *TO_RUNNING)
            waiting = asyncio.create_task(follow(client, 10_000))
            async with asyncio.timeout(5):
                while doors.open_streams("logs") != 1:
                    await asyncio.sleep(0.005)
            doors.tasks.tell("task-001", *lines(0, 5), *TO_COMPLETED)
            assert await asyncio.wait_for(waiting, 5) == [5 + 5 + len(TO_COMPLETED) + 1]

    asyncio.run(scene())


def test_who_reads_slowly_is_left_out_of_nothing(open_doors, monkeypatch):
    monkeypatch.setattr(buffer, "BUFFER_BYTES_MAX", 20_000)

    async def scene():
        async with open_doors() as doors:
            doors.tasks.add("task-001", *TO_RUNNING)
            async with connect(doors.ws("?task_id=task-001&after=0"), max_queue=1) as slow:
                for _ in range(40):
                    doors.tasks.tell("task-001", *[e.Output.from_bytes("stdout", b"x" * 20_000 + b"\n")] * 25)
                    await asyncio.sleep(0)
                doors.tasks.tell("task-001", *TO_COMPLETED)
                seqs = [json.loads(message)["seq"] async for message in slow]
            assert seqs == list(range(1, 5 + 1000 + len(TO_COMPLETED) + 2))

    asyncio.run(scene())
