"""Failed runtimes are probed again at increasing intervals; a working one is probed again on demand."""

import asyncio
from types import SimpleNamespace

import pytest
from msgspec import structs

from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.placement import ProbeResult
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.model.fixed_limits import (
    PROBE_INTERVAL_SECONDS_MIN,
    PROBE_JITTER,
    PROBE_PAUSE_SECONDS,
    PROBE_PAUSE_SECONDS_MAX,
)
from sandbox.server.placements import ProbedHost

UNAVAILABLE = ProbeResult(
    [RuntimeProbe("bubblewrap", False, "namespaces", 1, remedy="Install it.")],
    "bubblewrap",
    "namespaces",
    "It does not work.",
)
AVAILABLE = structs.replace(UNAVAILABLE, failure=None)
REAL_SLEEP = asyncio.sleep
"""The real `asyncio.sleep`, before the fixture `clock` replaces it."""


class SleepClock(SystemClock):
    """A clock that advances only during sleeps."""

    seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    sleep_clock = SleepClock()
    sleep_clock.slept = []

    async def sleep(seconds):
        sleep_clock.slept.append(seconds)
        sleep_clock.seconds += seconds

    monkeypatch.setattr("sandbox.server.placements.asyncio.sleep", sleep)
    return sleep_clock


def host_with(probe, problem=None):
    return SimpleNamespace(probe=probe, blocked_reason=lambda: problem)


async def run_until_idle(host):
    """Run the host until it waits for a request."""
    running = asyncio.create_task(host.run())
    for _ in range(5):
        await REAL_SLEEP(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def run(clock, first, *later, probe_requests=0):
    """Run a host with these probe results; request `probe_requests`, each when the host is idle."""
    results = iter(later)

    async def probe():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    async def scenario():
        await run_until_idle(host)
        for _ in range(probe_requests):
            host.request_probe()
            await run_until_idle(host)

    host = ProbedHost(first, host_with(probe), clock)
    asyncio.run(scenario())
    assert next(results, None) is None
    return host


def test_working_runtime_is_not_probed_again(clock):
    assert run(clock, AVAILABLE).blocked_reason is None
    assert clock.slept == []


def test_runtime_that_fails_later_blocks_tasks_until_it_works_again(clock, caplog):
    caplog.set_level("INFO")
    host = run(clock, AVAILABLE, UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, AVAILABLE, probe_requests=1)
    assert (host.result, host.blocked_reason, host.next_probe_at) == (AVAILABLE, None, None)
    assert clock.slept[:2] == [PROBE_INTERVAL_SECONDS_MIN, PROBE_PAUSE_SECONDS]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "No sandbox can be created; the next probe is at 20" in caplog.text


async def test_runtime_that_fails_later_is_reported(clock):
    reports, results = [], iter([UNAVAILABLE, UNAVAILABLE, AVAILABLE])

    async def probe():
        reports.append(host.result.failure)
        return next(results)

    host = ProbedHost(AVAILABLE, host_with(probe), clock)
    host.request_probe()
    await run_until_idle(host)
    assert reports == [None, None, "It does not work."]


def test_working_runtime_stays_available_after_a_requested_probe(clock, caplog):
    host = run(clock, AVAILABLE, AVAILABLE, UNAVAILABLE, AVAILABLE, OSError("busy"), probe_requests=3)
    assert (host.result, host.blocked_reason) == (AVAILABLE, None)
    assert "does not accept tasks" not in caplog.text


def test_requested_probes_of_a_working_runtime_are_rare(clock):
    run(clock, AVAILABLE, *[AVAILABLE] * 5, probe_requests=5)
    assert clock.slept == [PROBE_INTERVAL_SECONDS_MIN] * 5


async def test_requested_probe_is_not_announced_while_the_runtime_works(clock):
    host = ProbedHost(AVAILABLE, host_with(None), clock)
    host.request_probe()
    host.request_probe()
    assert (host.next_probe_at, host.retry_after_seconds, host.blocked_reason) == (None, None, None)


def test_failed_runtime_is_not_probed_earlier_on_request(clock):
    host = ProbedHost(UNAVAILABLE, host_with(None), clock)
    before = host.retry_after_seconds
    host.request_probe()
    assert host.retry_after_seconds == before


def test_final_failure_is_not_probed_again(clock):
    host = run(clock, structs.replace(UNAVAILABLE, is_permanent=True))
    assert (host.blocked_reason, host.next_probe_at, host.retry_after_seconds) == (
        "It does not work.",
        None,
        None,
    )


def test_backoff_doubles_up_to_a_maximum_with_jitter(clock):
    host = run(clock, *[UNAVAILABLE] * 12, AVAILABLE)
    assert host.result is AVAILABLE
    bounds = [min(PROBE_PAUSE_SECONDS * 2**number, PROBE_PAUSE_SECONDS_MAX) for number in range(12)]
    for slept, bound in zip(clock.slept, bounds, strict=True):
        assert bound * (1 - PROBE_JITTER) <= slept <= bound
    assert len({round(slept / bound, 6) for slept, bound in zip(clock.slept, bounds, strict=True)}) > 1


def test_failed_probe_is_retried(clock, caplog):
    assert run(clock, UNAVAILABLE, OSError("process limit reached"), AVAILABLE).result is AVAILABLE
    assert "process limit reached" in caplog.text


async def test_blocked_reason_names_the_next_probe_or_the_probe_in_progress(clock):
    reports = []

    async def probe():
        reports.append((host.blocked_reason, host.retry_after_seconds))
        return AVAILABLE

    host = ProbedHost(UNAVAILABLE, host_with(probe), clock)
    assert 1 <= host.retry_after_seconds <= PROBE_PAUSE_SECONDS
    assert "the next probe is at 20" in host.blocked_reason
    await run_until_idle(host)
    assert reports == [("No sandbox can be created; a probe is running. It does not work.", None)]


def test_host_that_does_not_respond_blocks_a_working_runtime(clock):
    host = host_with(None, "The host far is not responding.")
    assert ProbedHost(AVAILABLE, host, clock).blocked_reason == "The host far is not responding."
