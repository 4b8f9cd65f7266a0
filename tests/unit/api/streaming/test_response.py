"""What a client of a stream is handed, however fast it takes it."""

import asyncio

import pytest

from sandbox.api.streaming.buffer import Batch
from sandbox.api.streaming.response import PREFETCH_BYTES_MAX, Prefetcher


async def every(frames):
    for frame in frames:
        yield () if frame.get("hidden") else (frame["data"],)


async def taken(read_ahead):
    return [message async for message in _messages(read_ahead)]


async def _messages(read_ahead):
    while (batch := await read_ahead.next_batch()) is not None:
        for message in batch:
            yield message


def test_everything_comes_in_order_and_then_the_end():
    async def scene():
        frames = [{"data": str(number).encode(), "hidden": number % 3 == 0} for number in range(1000)]
        async with Prefetcher(every(frames)) as read_ahead:
            return await taken(read_ahead)

    assert asyncio.run(scene()) == [str(number).encode() for number in range(1000) if number % 3]


def test_a_client_that_takes_nothing_holds_the_source_back():
    asked_for = 0

    async def endless():
        nonlocal asked_for
        while True:
            asked_for += 1
            yield (b"x" * 1024,)

    async def scene():
        async with Prefetcher(endless()) as read_ahead:
            for _ in range(20):
                await asyncio.sleep(0)
            assert asked_for <= PREFETCH_BYTES_MAX // 1024 + 2
            await read_ahead.next_batch()
            await read_ahead.next_batch()
            assert asked_for > PREFETCH_BYTES_MAX // 1024 + 2

    asyncio.run(scene())


def test_silence_is_told_and_does_not_end_it():
    async def scene():
        more = asyncio.Event()

        async def late():
            await more.wait()
            yield (b"late",)

        async with Prefetcher(late()) as read_ahead:
            assert await read_ahead.next_batch(0.01) == []
            more.set()
            assert await read_ahead.next_batch(5) == [b"late"]
            assert await read_ahead.next_batch(5) is None

    asyncio.run(scene())


def test_an_occasion_ends_it_at_once_and_closes_the_source():
    is_closed = False

    async def silent():
        nonlocal is_closed
        try:
            await asyncio.Event().wait()
            yield ()
        finally:
            is_closed = True

    async def scene():
        ending = asyncio.Event()
        async with Prefetcher(silent()) as read_ahead:
            read_ahead.stop_after(ending.wait())
            ending.set()
            async with asyncio.timeout(1):
                assert await read_ahead.next_batch() is None

    asyncio.run(scene())
    assert is_closed


def test_what_the_source_raises_is_raised_after_what_it_gave():
    async def broken():
        yield (b"before",)
        raise ValueError("damaged")

    async def scene():
        async with Prefetcher(broken()) as read_ahead:
            assert await read_ahead.next_batch() == [b"before"]
            with pytest.raises(ValueError, match="damaged"):
                await read_ahead.next_batch()

    asyncio.run(scene())


def test_no_more_views_of_a_batch_are_kept_than_a_few():
    made = []

    class View:
        def encode(self, frames):
            made.append(self)
            return tuple(str(frame["seq"]).encode() for frame in frames)

    batch = Batch(0, [{"seq": 1, "type": "output"}], 1)
    first, *others = [View() for _ in range(50)]
    for view in (first, *others, *others, first):
        assert batch.encode(view, 0) == (b"1",)
    assert made.count(first) == 1
    assert made.count(others[-1]) == 2
