"""Streaming to fast and slow clients."""

import asyncio

import pytest

from sandbox.api.stream_cache import Batch, CacheMemory
from sandbox.api.streaming_response import PREFETCH_BYTES_MAX, Prefetcher


async def encode_events(events):
    for event in events:
        yield () if event.get("hidden") else (event["data"],)


async def read_all(prefetcher):
    return [message async for message in _iterate_messages(prefetcher)]


async def _iterate_messages(prefetcher):
    while (batch := await prefetcher.next_batch()) is not None:
        for message in batch:
            yield message


async def test_messages_arrive_in_order_and_then_the_stream_ends():
    async def run():
        events = [{"data": str(number).encode(), "hidden": number % 3 == 0} for number in range(1000)]
        async with Prefetcher(encode_events(events)) as prefetcher:
            return await read_all(prefetcher)

    assert (await run()) == [str(number).encode() for number in range(1000) if number % 3]


async def test_slow_client_pauses_the_source():
    produced = 0

    async def endless():
        nonlocal produced
        while True:
            produced += 1
            yield (b"x" * 1024,)

    async with Prefetcher(endless()) as prefetcher:
        for _ in range(20):
            await asyncio.sleep(0)
        assert produced <= PREFETCH_BYTES_MAX // 1024 + 2
        await prefetcher.next_batch()
        await prefetcher.next_batch()
        assert produced > PREFETCH_BYTES_MAX // 1024 + 2


async def test_timeout_returns_an_empty_batch():
    data_ready = asyncio.Event()

    async def late():
        await data_ready.wait()
        yield (b"late",)

    async with Prefetcher(late()) as prefetcher:
        assert await prefetcher.next_batch(0.01) == []
        data_ready.set()
        assert await prefetcher.next_batch(5) == [b"late"]
        assert await prefetcher.next_batch(5) is None


async def test_stop_condition_ends_the_stream_and_closes_the_source():
    is_closed = False

    async def silent():
        nonlocal is_closed
        try:
            await asyncio.Event().wait()
            yield ()
        finally:
            is_closed = True

    async def run():
        ending = asyncio.Event()
        async with Prefetcher(silent()) as prefetcher:
            prefetcher.stop_after(ending.wait())
            ending.set()
            async with asyncio.timeout(1):
                assert await prefetcher.next_batch() is None

    await run()
    assert is_closed


async def test_source_error_is_raised_after_earlier_messages():
    async def broken():
        yield (b"before",)
        raise ValueError("damaged")

    async with Prefetcher(broken()) as prefetcher:
        assert await prefetcher.next_batch() == [b"before"]
        with pytest.raises(ValueError, match="damaged"):
            await prefetcher.next_batch()


def test_encodings_of_a_batch_are_cached_for_a_limited_number_of_encoders():
    encodings = []

    class FakeEncoder:
        def encode(self, events):
            encodings.append(self)
            return tuple(str(event["seq"]).encode() for event in events)

    batch = Batch(0, [{"seq": 1, "type": "output"}], 1, CacheMemory())
    first, *others = [FakeEncoder() for _ in range(50)]
    for encoder in (first, *others, *others, first):
        assert batch.encode(encoder, 0) == (b"1",)
    assert encodings.count(first) == 1
    assert encodings.count(others[-1]) == 2
