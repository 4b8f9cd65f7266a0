"""What is done often is done at once for a while, and then at a rate, in order."""

import asyncio

import pytest

from sandbox.gateway.connection_rate import ConnectionRateLimiter


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on where something sleeps."""
    now = [100.0]
    rest = asyncio.sleep

    async def sleep(seconds):
        now[0] += seconds
        await rest(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return now


def test_what_is_past_the_number_at_once_waits_for_the_rate(clock):
    async def story():
        pace = ConnectionRateLimiter(3, 4, lambda: clock[0])
        at = []
        for _ in range(7):
            await pace.wait()
            at.append(clock[0] - 100)
        return at

    assert asyncio.run(story()) == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1])


def test_what_rests_may_be_done_at_once_again_and_no_more_often_than_that(clock):
    async def story():
        pace = ConnectionRateLimiter(2, 4, lambda: clock[0])
        for _ in range(2):
            await pace.wait()
        clock[0] += 1000
        began = clock[0]
        for _ in range(3):
            await pace.wait()
        return clock[0] - began

    assert asyncio.run(story()) == pytest.approx(0.25)


def test_who_gives_up_waiting_takes_nothing_from_those_behind():
    async def story():
        pace = ConnectionRateLimiter(1, 20)
        await pace.wait()
        first, second = asyncio.create_task(pace.wait()), asyncio.create_task(pace.wait())
        await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(2):
            await second

    asyncio.run(story())
