"""Each client gets a fair share of each iteration of the event loop. A client's streams take turns in order."""

import asyncio
import threading
import time
from itertools import pairwise

import pytest

from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import CONCURRENT_THREADS_MAX, MESSAGES_PER_TURN_MAX, FairShares


async def acquire_repeatedly(share, count, taken, size_bytes=100):
    for _ in range(count):
        await share.wait_for_turn(size_bytes)
        taken.append(share)


async def totals_per_loop_iteration(taken, count):
    """Return the total number of messages after each of the next `count` iterations of the event loop."""
    totals = []
    for _ in range(count):
        await asyncio.sleep(0)
        totals.append(len(taken))
    return totals


async def test_streams_of_one_client_share_its_messages_per_loop_iteration():
    share, taken = FairShares().of("vera"), []
    streams = [asyncio.create_task(acquire_repeatedly(share, 50, taken)) for _ in range(20)]
    totals = await totals_per_loop_iteration(taken, 10)
    assert all(after - before <= 2 * MESSAGES_PER_TURN_MAX for before, after in pairwise(totals))
    assert totals[-1] <= 10 * MESSAGES_PER_TURN_MAX
    async with asyncio.timeout(5):
        await asyncio.gather(*streams)
    assert len(taken) == 1000


async def test_streams_of_one_client_do_not_delay_another_client():
    shares, taken = FairShares(), []
    first_share, second_share = shares.of("vera"), shares.of("otto")
    streams = [asyncio.create_task(acquire_repeatedly(first_share, 1000, taken)) for _ in range(20)]
    await totals_per_loop_iteration(taken, 3)
    others = asyncio.create_task(acquire_repeatedly(second_share, 10, other_acquired := []))
    await totals_per_loop_iteration(taken, 1)
    assert len(other_acquired) == 10
    for stream in (*streams, others):
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)


async def test_large_message_is_counted_as_several_messages():
    share, taken = FairShares().of("vera"), []
    stream = asyncio.create_task(acquire_repeatedly(share, 10, taken, size_bytes=1024 * 1024))
    totals = await totals_per_loop_iteration(taken, 6)
    assert totals[-1] <= 6
    await stream


async def test_cancelled_streams_do_not_block_others():
    share, taken = FairShares().of("vera"), []
    streams = [asyncio.create_task(acquire_repeatedly(share, 50, taken)) for _ in range(20)]
    await totals_per_loop_iteration(taken, 2)
    for stream in streams[:10]:
        stream.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(*streams[10:])
    assert taken.count(share) >= 500
    await asyncio.gather(*streams[:10], return_exceptions=True)


def test_share_is_reused_while_it_is_held():
    shares = FairShares()
    held = shares.of("vera")
    assert shares.of("vera") is held
    assert shares.of("otto") is not held


async def test_shared_work_is_not_charged_to_any_client():
    share, taken = FairShares().of("vera"), []
    fair_client_shares.set_current_share(share)
    streams = [asyncio.create_task(acquire_repeatedly(share, 1000, [])) for _ in range(5)]
    await asyncio.sleep(0)
    with fair_client_shares.uncharged_work():
        reader = asyncio.create_task(acquire_from_current_share(100, taken))
        await fair_client_shares.wait_for_turn(1024 * 1024)
    await asyncio.sleep(0)
    assert len(taken) == 100
    charged_reader = asyncio.create_task(acquire_from_current_share(100, []))
    await asyncio.sleep(0)
    assert not charged_reader.done()
    for stream in (*streams, charged_reader, reader):
        stream.cancel()
    await asyncio.gather(*streams, charged_reader, reader, return_exceptions=True)


async def acquire_from_current_share(count, taken):
    for _ in range(count):
        await fair_client_shares.wait_for_turn(100)
        taken.append(count)


@pytest.mark.parametrize("use_share", [True, False])
async def test_threads_per_client_are_limited(use_share):
    async def run():
        shares, at_once, maximum = FairShares(), 0, 0

        def read():
            nonlocal at_once, maximum
            with lock:
                at_once += 1
                maximum = max(maximum, at_once)
            time.sleep(0.005)
            with lock:
                at_once -= 1

        async def use_thread(share):
            if use_share:
                fair_client_shares.set_current_share(share)
            await fair_client_shares.to_thread(read)

        lock, first_share, second_share = threading.Lock(), shares.of("vera"), shares.of("otto")
        readers = [asyncio.create_task(use_thread(first_share)) for _ in range(40)]
        other = asyncio.create_task(use_thread(second_share))
        if use_share:
            await other
            assert not all(task.done() for task in readers)
        await asyncio.gather(*readers, other)
        return maximum

    maximum = await run()
    assert (maximum <= CONCURRENT_THREADS_MAX + 1) is use_share


async def test_thread_slot_is_held_for_several_steps():
    share, active, maximum = FairShares().of("vera"), 0, 0

    async def use_slot():
        nonlocal active, maximum
        fair_client_shares.set_current_share(share)
        async with fair_client_shares.thread_slot():
            active += 1
            maximum = max(maximum, active)
            await fair_client_shares.to_thread(time.sleep, 0.002)
            await fair_client_shares.to_thread(time.sleep, 0.002)
            active -= 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(asyncio.create_task(use_slot()) for _ in range(20)))
    assert maximum == CONCURRENT_THREADS_MAX
