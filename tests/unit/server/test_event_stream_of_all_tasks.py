"""A slow subscriber receives gaps instead of the events that it missed."""

import asyncio

import pytest

from sandbox.server.event_stream import Broadcast


def event(seq, task_id="task-1"):
    return {"type": "output", "task_id": task_id, "seq": seq, "timestamp": f"at {seq}", "stream": "stdout", "data": ""}


@pytest.fixture(autouse=True)
def _small_memory(monkeypatch):
    monkeypatch.setattr("sandbox.server.event_stream.SUBSCRIBER_EVENTS_MAX", 2)


async def read(events, count):
    return [await asyncio.wait_for(anext(events), 5) for _ in range(count)]


def summarize(events):
    return [(f["task_id"], f.get("first_seq", f["seq"]), f["seq"], f["type"]) for f in events]


async def test_gap_replaces_the_missed_events():
    async def run():
        broadcast = Broadcast()
        events = broadcast.subscribe()
        for seq in (1, 2, 3):
            broadcast.publish(event(seq))
        received = await read(events, 1)
        broadcast.publish(event(4))
        received += await read(events, 2)
        broadcast.publish(event(5))
        return received + await read(events, 1)

    assert summarize(await run()) == [
        ("task-1", 1, 1, "output"),
        ("task-1", 2, 2, "output"),
        ("task-1", 3, 4, "gap"),
        ("task-1", 5, 5, "output"),
    ]


async def test_each_task_has_separate_gaps():
    async def run():
        broadcast = Broadcast()
        events = broadcast.subscribe()
        for seq in (1, 2, 3, 4):
            broadcast.publish(event(seq, "a" if seq % 2 else "b"))
        return await read(events, 4)

    assert summarize(await run())[2:] == [("a", 3, 3, "gap"), ("b", 4, 4, "gap")]


async def test_size_of_the_subscriber_queue_in_bytes_is_limited(monkeypatch):
    monkeypatch.setattr("sandbox.server.event_stream.SUBSCRIBER_EVENTS_MAX", 100)
    monkeypatch.setattr("sandbox.server.event_stream.SUBSCRIBER_BYTES_MAX", 3000)

    async def run():
        broadcast = Broadcast()
        events = broadcast.subscribe()
        for seq in range(1, 10):
            broadcast.publish({**event(seq), "data": "x" * 1000})
        received = await read(events, 4)
        broadcast.publish({**event(10), "data": "x" * 1000})
        return received + await read(events, 1)

    assert summarize(await run()) == [
        *[("task-1", seq, seq, "output") for seq in (1, 2, 3)],
        ("task-1", 4, 9, "gap"),
        ("task-1", 10, 10, "output"),
    ]


def test_slow_subscriber_does_not_affect_others():
    async def run():
        broadcast = Broadcast()
        slow, fast = broadcast.subscribe(), broadcast.subscribe()
        received = []
        for seq in range(1, 10):
            broadcast.publish(event(seq))
            received += await read(fast, 1)
        await slow.aclose()
        return received

    assert [f["seq"] for f in asyncio.run(run())] == list(range(1, 10))
