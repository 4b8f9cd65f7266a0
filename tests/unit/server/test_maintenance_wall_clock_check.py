"""Age limits of an hour or more are applied only after the wall clock has run for an hour without a jump."""

from datetime import UTC, datetime, timedelta

import pytest

from sandbox.server.maintenance import WallClockCheck

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
    wall_clock_check = WallClockCheck(clock)
    assert not wall_clock_check.is_trusted(90 * DAY)
    clock.advance(HOUR - 1)
    assert not wall_clock_check.is_trusted(90 * DAY)
    clock.advance(1)
    assert wall_clock_check.is_trusted(90 * DAY)
    clock.advance(400 * DAY)
    assert wall_clock_check.is_trusted(90 * DAY)


@pytest.mark.parametrize("seconds", [90 * DAY, -90 * DAY, HOUR, -HOUR])
def test_clock_adjustment_restarts_the_hour(seconds):
    clock = FakeClock()
    wall_clock_check = WallClockCheck(clock)
    clock.advance(2 * HOUR)
    clock.adjust(seconds)
    assert not wall_clock_check.is_trusted(DAY)
    clock.advance(HOUR / 2)
    clock.adjust(-seconds)
    assert not wall_clock_check.is_trusted(DAY)
    clock.advance(HOUR)
    assert wall_clock_check.is_trusted(DAY)


def test_clock_with_small_adjustments_is_trusted():
    clock = FakeClock()
    wall_clock_check = WallClockCheck(clock)
    for _ in range(15):
        clock.advance(300)
        clock.adjust(0.1)
    assert wall_clock_check.is_trusted(DAY)


def test_short_ages_are_always_trusted():
    assert WallClockCheck(FakeClock()).is_trusted(600)
