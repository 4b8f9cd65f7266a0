"""One client gets a part of each turn of the event loop, in order, and takes nothing from another."""

import asyncio
import threading
import time
from itertools import pairwise

import pytest

from sandbox.system import fair_share
from sandbox.system.fair_share import MESSAGES_PER_TURN_MAX, THREADS_AT_ONCE_MAX, FairShares


async def take_often(share, count, taken, size_bytes=100):
    for _ in range(count):
        await share.take(size_bytes)
        taken.append(share)


async def turns(taken, count):
    """How much was taken after each of the next turns of the loop."""
    found = []
    for _ in range(count):
        await asyncio.sleep(0)
        found.append(len(taken))
    return found


def test_many_streams_of_one_client_take_its_share_together_in_each_turn():
    async def story():
        share, taken = FairShares().of("vera"), []
        streams = [asyncio.create_task(take_often(share, 50, taken)) for _ in range(20)]
        seen = await turns(taken, 10)
        assert all(after - before <= 2 * MESSAGES_PER_TURN_MAX for before, after in pairwise(seen))
        assert seen[-1] <= 10 * MESSAGES_PER_TURN_MAX
        async with asyncio.timeout(5):
            await asyncio.gather(*streams)
        assert len(taken) == 1000

    asyncio.run(story())


def test_another_client_does_not_wait_for_them():
    async def story():
        shares, taken = FairShares(), []
        vera, otto = shares.of("vera"), shares.of("otto")
        streams = [asyncio.create_task(take_often(vera, 1000, taken)) for _ in range(20)]
        await turns(taken, 3)
        others = asyncio.create_task(take_often(otto, 10, others_taken := []))
        await turns(taken, 1)
        assert len(others_taken) == 10
        for stream in (*streams, others):
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    asyncio.run(story())


def test_large_messages_count_for_many():
    async def story():
        share, taken = FairShares().of("vera"), []
        stream = asyncio.create_task(take_often(share, 10, taken, size_bytes=1024 * 1024))
        seen = await turns(taken, 6)
        assert seen[-1] <= 6
        await stream

    asyncio.run(story())


def test_who_gives_up_keeps_nobody_waiting():
    async def story():
        share, taken = FairShares().of("vera"), []
        streams = [asyncio.create_task(take_often(share, 50, taken)) for _ in range(20)]
        await turns(taken, 2)
        for stream in streams[:10]:
            stream.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*streams[10:])
        assert taken.count(share) >= 500
        await asyncio.gather(*streams[:10], return_exceptions=True)

    asyncio.run(story())


def test_a_share_is_the_same_one_while_it_is_held():
    shares = FairShares()
    held = shares.of("vera")
    assert shares.of("vera") is held
    assert shares.of("otto") is not held


def test_shared_work_is_part_of_no_share_and_what_follows_it_is():
    async def story():
        share, taken = FairShares().of("vera"), []
        fair_share.use(share)
        streams = [asyncio.create_task(take_often(share, 1000, [])) for _ in range(5)]
        await asyncio.sleep(0)
        with fair_share.shared_work():
            reader = asyncio.create_task(take_from_context(100, taken))
            await fair_share.take(1024 * 1024)
        await asyncio.sleep(0)
        assert len(taken) == 100
        own = asyncio.create_task(take_from_context(100, []))
        await asyncio.sleep(0)
        assert not own.done()
        for stream in (*streams, own, reader):
            stream.cancel()
        await asyncio.gather(*streams, own, reader, return_exceptions=True)

    asyncio.run(story())


async def take_from_context(count, taken):
    for _ in range(count):
        await fair_share.take(100)
        taken.append(count)


@pytest.mark.parametrize("use_share", [True, False])
def test_few_threads_work_for_one_client_at_once_and_others_find_one_free(use_share):
    async def story():
        shares, at_once, most = FairShares(), 0, 0

        def read():
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.005)
            with lock:
                at_once -= 1

        async def ask(share):
            if use_share:
                fair_share.use(share)
            await fair_share.to_thread(read)

        lock, vera, otto = threading.Lock(), shares.of("vera"), shares.of("otto")
        asked = [asyncio.create_task(ask(vera)) for _ in range(40)]
        other = asyncio.create_task(ask(otto))
        if use_share:
            await other
            assert not all(task.done() for task in asked)
        await asyncio.gather(*asked, other)
        return most

    most = asyncio.run(story())
    assert (most <= THREADS_AT_ONCE_MAX + 1) is use_share


def test_several_steps_hold_one_thread_and_wait_for_no_other():
    async def story():
        share, inside, most = FairShares().of("vera"), 0, 0

        async def ask():
            nonlocal inside, most
            fair_share.use(share)
            async with fair_share.thread_slot():
                inside += 1
                most = max(most, inside)
                await fair_share.to_thread(time.sleep, 0.002)
                await fair_share.to_thread(time.sleep, 0.002)
                inside -= 1

        async with asyncio.timeout(10):
            await asyncio.gather(*(asyncio.create_task(ask()) for _ in range(20)))
        assert most == THREADS_AT_ONCE_MAX

    asyncio.run(story())
