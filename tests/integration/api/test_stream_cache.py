"""Many clients follow one task: events are read and encoded once, and each client gets every event exactly once."""

import asyncio
import json
import random
import re
import tracemalloc
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx2
import pytest
from websockets.asyncio.client import connect

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api import stream_cache, streaming_response
from sandbox.api.routes import logs
from sandbox.model import events as e
from sandbox.model.task_state import TaskState
from sandbox.primitives import fair_client_shares

LOGS_PATH = "/api/v1/tasks/task-001/logs?follow=true"


async def follow(client, after, *, disconnect_after=None):
    """Return the sequence numbers received over one connection."""
    seqs = []
    async with client.stream("GET", f"{LOGS_PATH}&after={after}") as response:
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                seqs.append(int(line[4:]))
                if disconnect_after is not None and len(seqs) >= disconnect_after:
                    break
    return seqs


async def follow_with_reconnects(client, last, rng):
    """Return the sequence numbers received by a client that reconnects until the end."""
    seqs = [0]
    while seqs[-1] != last:
        seqs += await follow(client, seqs[-1], disconnect_after=rng.choice([1, 7, 60, None]))
    return seqs[1:]


def lines(first, count):
    return [e.Output.from_bytes("stdout", f"line {number}\n".encode()) for number in range(first, first + count)]


async def test_reconnecting_clients_get_every_event_once(running_api, monkeypatch):
    # The buffers are so small that they no longer contain the events that a reconnecting client needs.
    monkeypatch.setattr(stream_cache, "BUFFER_BYTES_MAX", 20_000)
    monkeypatch.setattr(stream_cache, "HISTORY_BYTES_MAX", 20_000)
    monkeypatch.setattr(stream_cache, "_HISTORY_BATCH_BYTES", 7_000)
    async with running_api() as api:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=api.http, limits=limits, timeout=20) as client:
            api.tasks.add("task-001", *TO_RUNNING)
            last = 5 + 600 + len(TO_COMPLETED) + 1
            rng = random.Random(7)
            steady = [asyncio.create_task(follow(client, 0)) for _ in range(4)]
            reconnecting = [asyncio.create_task(follow_with_reconnects(client, last, rng)) for _ in range(6)]
            for number in range(30):
                api.tasks.record("task-001", *lines(number * 20, 20))
                await asyncio.sleep(0.01)
            api.tasks.record("task-001", *TO_COMPLETED)
            for seqs in await asyncio.gather(*steady, *reconnecting):
                assert seqs == list(range(1, last + 1))
        assert api.tasks.open_followers == 0


async def test_events_are_encoded_once_and_sent_in_batches(running_api, monkeypatch):
    encoded, sent, encode, take = [], [], logs._format_sse, streaming_response.Prefetcher.next_batch

    def counting_encode(event):
        encoded.append(event["seq"])
        return encode(event)

    async def recorded_batch(feed, idle_seconds):
        sent.append(events := await take(feed, idle_seconds))
        return events

    monkeypatch.setattr(logs, "_format_sse", counting_encode)
    monkeypatch.setattr(streaming_response.Prefetcher, "next_batch", recorded_batch)
    async with running_api() as api:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=api.http, limits=limits, timeout=20) as client:
            api.tasks.add("task-001", *TO_RUNNING)
            followers = [asyncio.create_task(follow(client, 0)) for _ in range(12)]
            async with asyncio.timeout(5):
                while api.count_open_streams("logs") < 12:
                    await asyncio.sleep(0.005)
            for number in range(50):
                api.tasks.record("task-001", *lines(number * 20, 20))
                await asyncio.sleep(0.001)
            api.tasks.record("task-001", *TO_COMPLETED)
            last = 5 + 1000 + len(TO_COMPLETED) + 1
            assert await asyncio.gather(*followers) == [list(range(1, last + 1))] * 12
            assert encoded == list(range(1, last + 1))
            assert len(sent) < 12 * 100


async def test_history_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(stream_cache, "_HISTORY_BATCH_BYTES", 1000)
    monkeypatch.setattr(stream_cache, "HISTORY_BYTES_MAX", 5000)

    async def events_from(after):
        for seq in range(after + 1, 101):
            yield {"type": "output", "seq": seq, "data": "x" * 100}

    history, position, reads = stream_cache.HistoryCache(stream_cache.CacheMemory()), 0, 0
    while position < 100:
        position, reads = (await history.load(events_from(position), position)).last_seq, reads + 1
    assert reads == 34
    assert await history.load(events_from(100), 100) is None
    cached = [position for position in range(101) if history.find(position)]
    assert cached == list(range(87, 100))


async def test_history_is_encoded_once_for_all_clients(running_api, monkeypatch):
    monkeypatch.setattr(stream_cache, "BUFFER_BYTES_MAX", 20_000)
    encoded, encode = [], logs._format_sse

    def counting_encode(event):
        encoded.append(event["seq"])
        return encode(event)

    monkeypatch.setattr(logs, "_format_sse", counting_encode)
    async with running_api() as api:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=api.http, limits=limits, timeout=20) as client:
            api.tasks.add("task-001", *TO_RUNNING, *lines(0, 3000))
            followers = [asyncio.create_task(follow(client, after)) for after in [0] * 10 + [1500] * 10]
            async with asyncio.timeout(5):
                while api.count_open_streams("logs") < 20:
                    await asyncio.sleep(0.005)
            api.tasks.record("task-001", *TO_COMPLETED)
            last = 5 + 3000 + len(TO_COMPLETED) + 1
            received = await asyncio.gather(*followers)
            assert received == [list(range(1, last + 1))] * 10 + [list(range(1501, last + 1))] * 10
            # If a client starts in the middle of a batch, the rest of the batch is encoded for this client only. All
            # other batches are shared.
            assert len(encoded) < last + 10 * 1500


async def test_each_client_has_a_separate_filter(running_api):
    async def received_types(api, query):
        async with connect(api.ws(f"?task_id=task-001&after=0{query}")) as socket:
            return [json.loads(message)["type"] async for message in socket]

    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        all_types = asyncio.create_task(received_types(api, ""))
        output = asyncio.create_task(received_types(api, "&filter=output"))
        metrics = asyncio.create_task(received_types(api, "&filter=metrics"))
        async with asyncio.timeout(5):
            while api.count_open_streams("websocket") != 3:
                await asyncio.sleep(0.005)
        sample = e.Metrics(cpu_percent=12.5, memory_used_bytes=1024)
        api.tasks.record("task-001", *lines(0, 2), sample, *TO_COMPLETED)
        assert await output == ["output", "output", "end"]
        assert await metrics == ["metrics", "end"]
        assert await all_types == ["state_change"] * 5 + ["output", "output", "metrics"] + ["state_change"] * 2 + [
            "end"
        ]


async def test_client_that_starts_after_the_last_event_gets_only_the_end_event(running_api):
    async with running_api() as api, httpx2.AsyncClient(base_url=api.http, timeout=10) as client:
        api.tasks.add("task-001", *TO_RUNNING)
        waiting = asyncio.create_task(follow(client, 10_000))
        async with asyncio.timeout(5):
            while api.count_open_streams("logs") != 1:
                await asyncio.sleep(0.005)
        api.tasks.record("task-001", *lines(0, 5), *TO_COMPLETED)
        assert await asyncio.wait_for(waiting, 5) == [5 + 5 + len(TO_COMPLETED) + 1]


async def test_slow_reader_gets_every_event(running_api, monkeypatch):
    monkeypatch.setattr(stream_cache, "BUFFER_BYTES_MAX", 20_000)
    async with running_api() as api:
        api.tasks.add("task-001", *TO_RUNNING)
        async with connect(api.ws("?task_id=task-001&after=0"), max_queue=1) as slow:
            for _ in range(40):
                api.tasks.record("task-001", *[e.Output.from_bytes("stdout", b"x" * 20_000 + b"\n")] * 25)
                await asyncio.sleep(0)
            api.tasks.record("task-001", *TO_COMPLETED)
            seqs = [json.loads(message)["seq"] async for message in slow]
        assert seqs == list(range(1, 5 + 1000 + len(TO_COMPLETED) + 2))


@pytest.mark.parametrize(
    "has_many_readers", [True, False], ids=["a-token-with-many-readers", "a-token-with-one-reader"]
)
async def test_history_reads_are_shared_fairly_between_tokens(has_many_readers, monkeypatch):
    monkeypatch.setattr(stream_cache, "_HISTORY_BATCH_BYTES", 1000)
    monkeypatch.setattr(stream_cache, "HISTORY_BYTES_MAX", 5000)
    history, last, loads = stream_cache.HistoryCache(stream_cache.CacheMemory()), 10_000, []

    def events_after(client, position):
        async def events():
            loads.append(client)
            for seq in range(position + 1, last + 1):
                await asyncio.sleep(0)
                yield {"type": "output", "seq": seq, "data": "x" * 100}

        return events

    async def read(client, share, position, batches):
        fair_client_shares.set_current_share(share)
        for _ in range(batches):
            position = (await history.get_or_load(position, events_after(client, position))).last_seq

    other, own = fair_client_shares.FairShare(), fair_client_shares.FairShare()
    readers = [
        asyncio.create_task(read("other", other, number * 20, 10)) for number in range(200 if has_many_readers else 1)
    ]
    await asyncio.sleep(0)
    await asyncio.create_task(read("own", own, 7, 10))
    reads_of_the_other = loads.count("other")
    await asyncio.gather(*readers)
    assert reads_of_the_other <= 40
    assert loads.count("own") == 10


EVENT_COUNT = 300
ALL_SEQS = list(range(1, EVENT_COUNT + 1))


class LongTasks:
    """Running tasks with the same output. Implements the methods of `TaskEvents` that the cache uses."""

    def __init__(self, text):
        self.text, self.reads = text, 0

    async def follow(self, task_id, *, after=None):
        assert after is None
        yield {"type": "state_change", "seq": EVENT_COUNT}
        await asyncio.Event().wait()

    async def recorded_events(self, task_id, *, after=0):
        self.reads += 1
        for seq in range(after + 1, EVENT_COUNT + 1):
            yield {"type": "output", "stream": "stderr", "timestamp": "~", "seq": seq, "data": self.text + str(seq)}


@asynccontextmanager
async def open_streams(cache, tasks, encoders):
    """Follow each task with each encoder. Once every stream has sent all events, yield the seqs of each stream."""
    received = [[] for _ in range(len(tasks) * len(encoders))]

    async def read(stream, seqs):
        async for messages in stream:
            seqs += [int(seq) for seq in re.findall(rb"^id: (\d+)$", b"".join(messages), re.MULTILINE)]
            del messages

    streams = [cache.follow(task, encoder, after=0) for task in tasks for encoder in encoders]
    readers = [asyncio.create_task(read(*each)) for each in zip(streams, received, strict=True)]
    async with asyncio.timeout(30):
        while not all(seqs and seqs[-1] == EVENT_COUNT for seqs in received):
            await asyncio.sleep(0.01)
    try:
        yield received
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def encoders(count):
    """Return encoders that clients can choose with the parameter `since`; each encodes all events."""
    return [logs.LogEncoder("all", " " * number, logs._format_sse, True) for number in range(count)]


def running_tasks(count):
    return [SimpleNamespace(id=f"task-{number}", state=TaskState.RUNNING) for number in range(count)]


@pytest.mark.parametrize("character", ["x", "\x01", "\N{GRINNING FACE}"], ids=["ascii", "escaped", "wide"])
async def test_memory_of_the_cache_is_bounded_for_all_tasks(character, monkeypatch):
    monkeypatch.setattr(stream_cache, "_HISTORY_BATCH_BYTES", 15_000)
    monkeypatch.setattr(stream_cache, "HISTORY_BYTES_MAX", 200_000)
    monkeypatch.setattr(stream_cache, "CACHED_BYTES_MAX", 1_000_000)
    cache = stream_cache.StreamCache(LongTasks(character * 1000))
    tracemalloc.start()
    try:
        async with open_streams(cache, running_tasks(4), encoders(8)) as received:
            assert received == [ALL_SEQS] * 32
            used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used_bytes < 2_000_000
    assert cache._memory.used_bytes == 0


async def test_history_is_read_once_for_the_streams_of_several_tasks(monkeypatch):
    monkeypatch.setattr(stream_cache, "_HISTORY_BATCH_BYTES", 50_000)
    events = LongTasks("x" * 1000)
    cache = stream_cache.StreamCache(events)
    tasks, [first, second] = running_tasks(3), encoders(2)
    async with open_streams(cache, tasks, [first]):
        reads = events.reads
        async with open_streams(cache, tasks, [first, second]) as received:
            assert received == [ALL_SEQS] * 6
        assert events.reads == reads
