"""When the runtimes are probed again, and when they are not."""

import asyncio
from dataclasses import replace

import pytest

from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.placement import LaunchOrder
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.model.limits import PROBE_BACKOFF_SECONDS, PROBE_BACKOFF_SECONDS_MAX, PROBE_JITTER
from sandbox.server.runtime_prober import ProbeResult, RuntimeProber

FAILS = ProbeResult(
    [RuntimeProbe("bubblewrap", False, "namespaces", 1, remedy="Install it.")],
    LaunchOrder("", "", "", "", "bubblewrap"),
    "namespaces",
    "It does not work.",
)
WORKS = replace(FAILS, failure=None)


class PassingClock(SystemClock):
    """Goes on by what is slept, and by nothing else."""

    seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    made = PassingClock()
    made.slept = []

    async def sleep(seconds):
        made.slept.append(seconds)
        made.seconds += seconds

    monkeypatch.setattr("sandbox.server.runtime_prober.asyncio.sleep", sleep)
    return made


def run(clock, first, *later):
    found = iter(later)

    async def probe():
        one = next(found)
        if isinstance(one, Exception):
            raise one
        return one

    prober = RuntimeProber(first, probe, clock)
    asyncio.run(prober.run())
    assert next(found, None) is None
    return prober


def test_what_works_at_once_is_not_probed_again(clock):
    assert run(clock, WORKS).blocked_reason is None
    assert clock.slept == []


def test_what_never_can_work_is_not_probed_again_and_no_next_try_is_promised(clock):
    prober = run(clock, replace(FAILS, is_final=True))
    assert (prober.blocked_reason, prober.next_probe_at, prober.retry_after_seconds) == (
        "It does not work.",
        None,
        None,
    )


def test_pauses_double_up_to_a_bound_and_none_is_longer_than_it_may_be(clock):
    prober = run(clock, *[FAILS] * 12, WORKS)
    assert prober.result is WORKS
    bounds = [min(PROBE_BACKOFF_SECONDS * 2**number, PROBE_BACKOFF_SECONDS_MAX) for number in range(12)]
    for slept, bound in zip(clock.slept, bounds, strict=True):
        assert bound * (1 - PROBE_JITTER) <= slept <= bound
    assert len({round(slept / bound, 6) for slept, bound in zip(clock.slept, bounds, strict=True)}) > 1


def test_a_probe_that_breaks_is_followed_by_another(clock, caplog):
    assert run(clock, FAILS, OSError("no more processes"), WORKS).result is WORKS
    assert "no more processes" in caplog.text


def test_until_the_next_probe_it_says_when_that_is_and_during_a_probe_that_one_is_under_way(clock):
    told = []

    async def probe():
        told.append((prober.blocked_reason, prober.retry_after_seconds))
        return WORKS

    prober = RuntimeProber(FAILS, probe, clock)
    assert 1 <= prober.retry_after_seconds <= PROBE_BACKOFF_SECONDS
    assert "the next probe is at 20" in prober.blocked_reason
    asyncio.run(prober.run())
    assert told == [("No sandbox can be created; a probe is under way. It does not work.", None)]
