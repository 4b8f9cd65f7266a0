"""Output has a speed and an end: the first makes the agent wait, the second is told."""

import asyncio

import pytest

from sandbox.runner import agent_output as module
from sandbox.runner.agent_output import OutputQuota

MIB = 1024 * 1024


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now_seconds = 0.0
        monkeypatch.setattr(module.asyncio, "sleep", self.sleep)

    def monotonic(self):
        return self.now_seconds

    async def sleep(self, seconds):
        self.now_seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def take(allowance, size_bytes, times=1):
    async def story():
        return [await allowance.acquire(size_bytes) for _ in range(times)]

    return asyncio.run(story())


def test_an_agent_that_writes_much_at_once_does_not_wait(clock):
    assert all(take(OutputQuota(clock), MIB, 60))
    assert clock.now_seconds == 0.0


def test_one_that_goes_on_is_held_to_the_speed_and_loses_nothing(clock):
    assert all(take(OutputQuota(clock), MIB, 144))
    assert clock.now_seconds == pytest.approx(10.0, rel=0.01)


def test_a_pause_gives_the_burst_back(clock):
    allowance = OutputQuota(clock)
    take(allowance, MIB, 80)
    waited = clock.now_seconds
    clock.now_seconds += 60
    take(allowance, MIB, 60)
    assert clock.now_seconds == waited + 60


def test_empty_lines_count_too(clock):
    assert all(take(OutputQuota(clock), 1, 1_000_000))
    assert clock.now_seconds > 5


def test_past_the_total_everything_is_counted_and_nothing_waits(clock, monkeypatch):
    monkeypatch.setattr(module, "OUTPUT_BYTES_MAX", 2 * MIB)
    allowance = OutputQuota(clock)
    assert take(allowance, MIB, 4) == [True, False, False, False]
    assert take(allowance, 1000) == [True]
    assert allowance.dropped_bytes == 3 * MIB
