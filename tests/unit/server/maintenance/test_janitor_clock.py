"""A wall clock is believed about ages once it has gone evenly for an hour."""

from datetime import UTC, datetime, timedelta

import pytest

from sandbox.server.maintenance.janitor import ClockCheck

HOUR = 3600.0
DAY = 24 * HOUR


class PlayedClock:
    """Time passes, and somebody sets the wall clock."""

    def __init__(self):
        self.passed_seconds, self.wall = 0.0, datetime(2026, 1, 29, tzinfo=UTC)

    def now(self):
        return self.wall

    def monotonic(self):
        return self.passed_seconds

    def passes(self, seconds):
        self.passed_seconds += seconds
        self.wall += timedelta(seconds=seconds)

    def is_set(self, seconds):
        self.wall += timedelta(seconds=seconds)


def test_an_hour_after_the_start_and_not_before():
    clock = PlayedClock()
    calendar = ClockCheck(clock)
    assert not calendar.is_trusted(90 * DAY)
    clock.passes(HOUR - 1)
    assert not calendar.is_trusted(90 * DAY)
    clock.passes(1)
    assert calendar.is_trusted(90 * DAY)
    clock.passes(400 * DAY)
    assert calendar.is_trusted(90 * DAY)


@pytest.mark.parametrize("seconds", [90 * DAY, -90 * DAY, HOUR, -HOUR])
def test_whoever_sets_it_begins_the_hour_anew(seconds):
    clock = PlayedClock()
    calendar = ClockCheck(clock)
    clock.passes(2 * HOUR)
    clock.is_set(seconds)
    assert not calendar.is_trusted(DAY)
    clock.passes(HOUR / 2)
    clock.is_set(-seconds)
    assert not calendar.is_trusted(DAY)
    clock.passes(HOUR)
    assert calendar.is_trusted(DAY)


def test_a_time_server_that_pulls_at_it_disturbs_nobody():
    clock = PlayedClock()
    calendar = ClockCheck(clock)
    for _ in range(15):
        clock.passes(300)
        clock.is_set(0.1)
    assert calendar.is_trusted(DAY)


def test_what_is_kept_for_minutes_goes_after_minutes():
    assert ClockCheck(PlayedClock()).is_trusted(600)
