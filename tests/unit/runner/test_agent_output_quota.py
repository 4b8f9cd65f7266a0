"""Output has a rate limit, which delays the agent, and a total limit, beyond which output is dropped and counted."""

import asyncio

import pytest

from sandbox.runner import agent_output as module
from sandbox.runner.agent_output import OutputQuota

MIB = 1024 * 1024


class FakeClock:
    """A clock that advances only during sleeps."""

    def __init__(self, monkeypatch):
        self.now_seconds = 0.0
        monkeypatch.setattr(module.asyncio, "sleep", self.sleep)

    def monotonic(self):
        return self.now_seconds

    async def sleep(self, seconds):
        self.now_seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def acquire(quota, size_bytes, times=1):
    async def run():
        return [await quota.acquire(size_bytes) for _ in range(times)]

    return asyncio.run(run())


def test_burst_is_not_delayed(clock):
    assert all(acquire(OutputQuota(clock), MIB, 60))
    assert clock.now_seconds == 0.0


def test_sustained_output_is_rate_limited_without_loss(clock):
    assert all(acquire(OutputQuota(clock), MIB, 144))
    assert clock.now_seconds == pytest.approx(10.0, rel=0.01)


def test_pause_refills_the_burst(clock):
    quota = OutputQuota(clock)
    acquire(quota, MIB, 80)
    before = clock.now_seconds
    clock.now_seconds += 60
    acquire(quota, MIB, 60)
    assert clock.now_seconds == before + 60


def test_empty_lines_are_rate_limited(clock):
    assert all(acquire(OutputQuota(clock), 1, 1_000_000))
    assert clock.now_seconds > 5


def test_output_past_the_total_limit_is_counted_without_delay(clock, monkeypatch):
    monkeypatch.setattr(module, "OUTPUT_BYTES_MAX", 2 * MIB)
    quota = OutputQuota(clock)
    assert acquire(quota, MIB, 4) == [True, False, False, False]
    assert acquire(quota, 1000) == [True]
    assert quota.dropped_bytes == 3 * MIB
