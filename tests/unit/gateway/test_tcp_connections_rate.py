"""The connection rate limiter allows an initial burst, then admits connections at a fixed rate in order of arrival."""

import asyncio

import pytest

from sandbox.gateway.tcp_connections import ConnectionRateLimiter


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only during sleeps."""
    now = [100.0]
    original_sleep = asyncio.sleep

    async def sleep(seconds):
        now[0] += seconds
        await original_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return now


async def test_connections_beyond_the_burst_wait_for_the_rate(clock):
    async def run():
        limiter = ConnectionRateLimiter(3, 4, lambda: clock[0])
        times = []
        for _ in range(7):
            await limiter.wait()
            times.append(clock[0] - 100)
        return times

    assert (await run()) == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1])


async def test_idle_time_refills_the_burst_up_to_its_size(clock):
    async def run():
        limiter = ConnectionRateLimiter(2, 4, lambda: clock[0])
        for _ in range(2):
            await limiter.wait()
        clock[0] += 1000
        start = clock[0]
        for _ in range(3):
            await limiter.wait()
        return clock[0] - start

    assert (await run()) == pytest.approx(0.25)


async def test_cancelled_waiter_does_not_delay_the_next():
    limiter = ConnectionRateLimiter(1, 20)
    await limiter.wait()
    first, second = asyncio.create_task(limiter.wait()), asyncio.create_task(limiter.wait())
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(2):
        await second
