"""A slow subscriber receives gaps instead of the events that it missed."""

import asyncio

import pytest

from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import RESPONSES_BYTES_MAX, FairShare
from sandbox.server.event_streams import Broadcast


def event(seq, task_id="task-1"):
    return {"type": "output", "task_id": task_id, "seq": seq, "timestamp": f"at {seq}", "stream": "stdout", "data": ""}


@pytest.fixture(autouse=True)
def _small_memory(monkeypatch):
    monkeypatch.setattr("sandbox.server.event_streams.SUBSCRIBER_EVENTS_MAX", 2)


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
    monkeypatch.setattr("sandbox.server.event_streams.SUBSCRIBER_EVENTS_MAX", 100)
    monkeypatch.setattr("sandbox.server.event_streams.SUBSCRIBER_BYTES_MAX", 3000)

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


def use_share():
    """Use a fair share in the current test only. A fixture would also set the share for all later tests."""
    share = FairShare()
    fair_client_shares.set_current_share(share)
    return share


def fill_unread_queues(broadcast, monkeypatch, count):
    """Subscribe and let each queue fill before the next one begins, so that no two queues contain the same events."""
    monkeypatch.setattr("sandbox.server.event_streams.SUBSCRIBER_EVENTS_MAX", 10_000)
    subscribers = []
    for _ in range(count):
        subscribers.append(broadcast.subscribe())
        for seq in range(1, 21):
            broadcast.publish({**event(seq), "data": "x" * 1024 * 1024})
    return subscribers


async def test_unread_queues_of_one_client_use_its_memory(monkeypatch):
    share, broadcast = use_share(), Broadcast()
    subscribers = fill_unread_queues(broadcast, monkeypatch, 20)
    assert share.memory.reserved_bytes < 1.1 * RESPONSES_BYTES_MAX
    received = [await read(each, 1) for each in subscribers]
    assert [one["type"] for (one,) in received[:2]] == ["output"] * 2
    assert [one["type"] for one in received[-1]] == ["gap"]
    for each in subscribers:
        await each.aclose()
    assert share.memory.reserved_bytes == 0


async def test_large_event_is_queued_only_if_there_is_memory():
    """Otherwise, each subscriber would keep one event of up to 16 MiB after its client's memory is used up."""
    share, broadcast = use_share(), Broadcast()
    subscribers = [broadcast.subscribe() for _ in range(100)]
    broadcast.publish({**event(1), "data": "x" * (RESPONSES_BYTES_MAX // 10)})
    received = [(await read(each, 1))[0]["type"] for each in subscribers]
    assert (received.count("output"), received.count("gap")) == (9, 91)
    broadcast.publish(event(2))
    assert [(await read(each, 1))[0]["type"] for each in subscribers] == ["output"] * 100
    for each in subscribers:
        await each.aclose()
    assert share.memory.reserved_bytes == 0


async def test_reading_client_misses_nothing_even_if_its_memory_is_used_up(monkeypatch):
    use_share()
    broadcast = Broadcast()
    fill_unread_queues(broadcast, monkeypatch, 20)
    events = broadcast.subscribe()
    received = []
    for seq in range(1, 51):
        broadcast.publish({**event(seq), "data": "x" * 10_000})
        received += await read(events, 1)
    assert [one["seq"] for one in received] == list(range(1, 51))


async def test_gaps_of_many_tasks_use_the_memory_of_the_client():
    share, broadcast = use_share(), Broadcast()
    events = broadcast.subscribe()
    for number in range(1002):
        broadcast.publish(event(1, f"task-{number}"))
    assert share.memory.reserved_bytes > 1_000_000
    assert [one["type"] for one in await read(events, 1002)] == ["output"] * 2 + ["gap"] * 1000
    assert share.memory.reserved_bytes == 0
    await events.aclose()
