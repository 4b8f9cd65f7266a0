"""Age limits of an hour or more are applied only after the wall clock has run for an hour without a jump."""

from datetime import UTC, datetime, timedelta

import pytest

from sandbox.server.maintenance.clock_trust import ClockTrust

HOUR = 3600.0
DAY = 24 * HOUR


class FakeClock:
    """A clock whose monotonic and wall time the test sets."""

    def __init__(self):
        self.passed_seconds, self.wall = 0.0, datetime(2026, 1, 29, tzinfo=UTC)

    def now(self):
        return self.wall

    def monotonic(self):
        return self.passed_seconds

    def advance(self, seconds):
        self.passed_seconds += seconds
        self.wall += timedelta(seconds=seconds)

    def adjust(self, seconds):
        self.wall += timedelta(seconds=seconds)


def test_clock_is_trusted_after_one_hour():
    clock = FakeClock()
    clock_trust = ClockTrust(clock)
    assert not clock_trust.is_trusted(90 * DAY)
    clock.advance(HOUR - 1)
    assert not clock_trust.is_trusted(90 * DAY)
    clock.advance(1)
    assert clock_trust.is_trusted(90 * DAY)
    clock.advance(400 * DAY)
    assert clock_trust.is_trusted(90 * DAY)


@pytest.mark.parametrize("seconds", [90 * DAY, -90 * DAY, HOUR, -HOUR])
def test_clock_adjustment_restarts_the_hour(seconds):
    clock = FakeClock()
    clock_trust = ClockTrust(clock)
    clock.advance(2 * HOUR)
    clock.adjust(seconds)
    assert not clock_trust.is_trusted(DAY)
    clock.advance(HOUR / 2)
    clock.adjust(-seconds)
    assert not clock_trust.is_trusted(DAY)
    clock.advance(HOUR)
    assert clock_trust.is_trusted(DAY)


def test_clock_with_small_adjustments_is_trusted():
    clock = FakeClock()
    clock_trust = ClockTrust(clock)
    for _ in range(15):
        clock.advance(300)
        clock.adjust(0.1)
    assert clock_trust.is_trusted(DAY)


def test_short_ages_are_always_trusted():
    assert ClockTrust(FakeClock()).is_trusted(600)
