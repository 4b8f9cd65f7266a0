"""The memory for responses to one client is limited. Closing stalled connections frees memory."""

import asyncio

import pytest

from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import STALLED_SECONDS, MemoryShare


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def reserve_until(memory, size_bytes, done):
    async with memory.reservation(size_bytes):
        await done.wait()


async def yield_to_loop(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_reservation_over_the_limit_fails_until_memory_is_released():
    memory = MemoryShare(100)
    assert await memory.try_reserve(60)
    assert not await memory.try_reserve(41)
    assert await memory.try_reserve(40)
    memory.release(60)
    assert await memory.try_reserve(41)
    assert memory.reserved_bytes == 81


async def test_reservation_over_the_limit_succeeds_if_no_other_reservation_exists():
    memory = MemoryShare(100)
    assert await memory.try_reserve(500)
    assert not await memory.try_reserve(0)


async def test_waiters_are_admitted_in_order():
    memory, done = MemoryShare(100), [asyncio.Event() for _ in range(3)]
    waiting = [
        asyncio.create_task(reserve_until(memory, size, end)) for size, end in zip((80, 70, 10), done, strict=True)
    ]
    await yield_to_loop()
    assert memory.reserved_bytes == 80
    done[0].set()
    await yield_to_loop()
    assert memory.reserved_bytes == 80
    for end in done:
        end.set()
    await asyncio.gather(*waiting)
    assert memory.reserved_bytes == 0


@pytest.mark.parametrize("was_admitted", [False, True])
async def test_cancelled_waiter_holds_no_memory_and_does_not_block_others(was_admitted):
    memory = MemoryShare(100)
    assert await memory.try_reserve(80)
    first = asyncio.create_task(reserve_until(memory, 50, asyncio.Event()))
    second = asyncio.create_task(reserve_until(memory, 40, done := asyncio.Event()))
    await yield_to_loop()
    if was_admitted:
        memory.release(80)
        memory.force_reserve(80)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    memory.release(80)
    await yield_to_loop()
    assert memory.reserved_bytes == 40
    done.set()
    await second
    assert memory.reserved_bytes == 0


@pytest.mark.parametrize(("seconds", "is_closed"), [(STALLED_SECONDS - 1, False), (STALLED_SECONDS, True)])
async def test_only_a_stalled_connection_is_closed_to_free_memory(seconds, is_closed):
    clock = FakeClock()
    memory = MemoryShare(100, clock)
    memory.force_reserve(100)
    with memory.closing_if_stalled(lambda: memory.release(100)):
        clock.now += seconds
        assert await memory.try_reserve(50) is is_closed


async def test_stalled_connection_is_kept_while_memory_is_free():
    clock, aborted = FakeClock(), []
    memory = MemoryShare(100, clock)
    with memory.closing_if_stalled(lambda: aborted.append(1)):
        clock.now += 10 * STALLED_SECONDS
        assert await memory.try_reserve(50)
    assert aborted == []


async def test_waiter_closes_stalled_connections():
    clock = FakeClock()
    memory = MemoryShare(100, clock)
    memory.force_reserve(100)
    with memory.closing_if_stalled(lambda: memory.release(100)):
        clock.now += STALLED_SECONDS
        async with asyncio.timeout(5), memory.reservation(50):
            assert memory.reserved_bytes == 50


async def test_shares_have_separate_memory_and_work_without_a_share_is_unlimited():
    shares = fair_client_shares.FairShares()
    first_share, second_share = shares.of("vera"), shares.of("otto")
    assert await first_share.memory.try_reserve(10**12)
    assert await second_share.memory.try_reserve(1)
    assert not await first_share.memory.try_reserve(1)
    assert await fair_client_shares.current_memory_share().try_reserve(10**12)
    fair_client_shares.set_current_share(second_share)
    assert fair_client_shares.current_memory_share() is second_share.memory
