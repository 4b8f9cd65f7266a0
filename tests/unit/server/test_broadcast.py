"""A subscriber that does not keep up is told what it missed, in its place."""

import asyncio

import pytest

from sandbox.server.broadcast import Broadcast


def frame(seq, task_id="task-1"):
    return {"type": "output", "task_id": task_id, "seq": seq, "timestamp": f"at {seq}"}


@pytest.fixture(autouse=True)
def _small_memory(monkeypatch):
    monkeypatch.setattr("sandbox.server.broadcast.SUBSCRIBER_EVENTS_MAX", 2)


async def read(frames, count):
    return [await asyncio.wait_for(anext(frames), 5) for _ in range(count)]


def shown(frames):
    return [(f["task_id"], f.get("first_seq", f["seq"]), f["seq"], f["type"]) for f in frames]


def test_a_gap_stands_where_the_frames_would_have_stood():
    async def play():
        broadcast = Broadcast()
        frames = broadcast.subscribe()
        for seq in (1, 2, 3):
            broadcast.publish(frame(seq))
        seen = await read(frames, 1)
        broadcast.publish(frame(4))
        seen += await read(frames, 2)
        broadcast.publish(frame(5))
        return seen + await read(frames, 1)

    assert shown(asyncio.run(play())) == [
        ("task-1", 1, 1, "output"),
        ("task-1", 2, 2, "output"),
        ("task-1", 3, 4, "gap"),
        ("task-1", 5, 5, "output"),
    ]


def test_each_task_has_a_gap_of_its_own():
    async def play():
        broadcast = Broadcast()
        frames = broadcast.subscribe()
        for seq in (1, 2, 3, 4):
            broadcast.publish(frame(seq, "a" if seq % 2 else "b"))
        return await read(frames, 4)

    assert shown(asyncio.run(play()))[2:] == [("a", 3, 3, "gap"), ("b", 4, 4, "gap")]


def test_long_output_is_bounded_by_its_bytes(monkeypatch):
    monkeypatch.setattr("sandbox.server.broadcast.SUBSCRIBER_EVENTS_MAX", 100)
    monkeypatch.setattr("sandbox.server.broadcast.SUBSCRIBER_BYTES_MAX", 3000)

    async def play():
        broadcast = Broadcast()
        frames = broadcast.subscribe()
        for seq in range(1, 10):
            broadcast.publish({**frame(seq), "data": "x" * 1000})
        seen = await read(frames, 4)
        broadcast.publish({**frame(10), "data": "x" * 1000})
        return seen + await read(frames, 1)

    assert shown(asyncio.run(play())) == [
        *[("task-1", seq, seq, "output") for seq in (1, 2, 3)],
        ("task-1", 4, 9, "gap"),
        ("task-1", 10, 10, "output"),
    ]


def test_who_keeps_up_misses_nothing_whatever_the_others_do():
    async def play():
        broadcast = Broadcast()
        slow, quick = broadcast.subscribe(), broadcast.subscribe()
        seen = []
        for seq in range(1, 10):
            broadcast.publish(frame(seq))
            seen += await read(quick, 1)
        await slow.aclose()
        return seen

    assert [f["seq"] for f in asyncio.run(play())] == list(range(1, 10))
