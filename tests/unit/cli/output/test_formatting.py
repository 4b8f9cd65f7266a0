"""Figures as people read them."""

from datetime import UTC, datetime

import pytest

from sandbox.cli.output import formatting

NOW = datetime(2026, 1, 29, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.012, "12 ms"),
        (1.23, "1.2 s"),
        (42, "42 s"),
        (59.7, "1 min 0 s"),
        (125, "2 min 5 s"),
        (11520, "3 h 12 min"),
        (-1, "0 ms"),
    ],
)
def test_durations(seconds, shown):
    assert formatting.format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("at", "shown"),
    [
        ("2026-01-29T11:59:18.000Z", "42 s"),
        ("2026-01-29T11:48:00.000Z", "12 min"),
        ("2026-01-29T09:00:00.000Z", "3 h"),
        ("2026-01-25T09:00:00.000Z", "4 d"),
        ("2026-01-29T12:00:09.000Z", "0 s"),
        ("nonsense", "-"),
        ("0001-01-01T00:00:00+14:00", "-"),
        (None, "-"),
    ],
)
def test_ages(at, shown):
    assert formatting.format_age(at, NOW) == shown


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**2, "3.0 MiB"), (5 * 1024**3, "5.0 GiB")],
)
def test_sizes(size_bytes, shown):
    assert formatting.format_size(size_bytes) == shown


def test_small_amounts_of_money_keep_their_digits():
    assert (formatting.format_cost(0.0374), formatting.format_cost(12.5)) == ("$0.0374", "$12.50")


def test_a_time_that_is_none_is_shown_as_none():
    for before_and_after_all in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert formatting.format_time(before_and_after_all) == "--:--:--"
    assert (
        formatting.format_time("nonsense"),
        formatting.format_datetime(None),
        formatting.format_elapsed(None, "x"),
    ) == ("--:--:--", "-", "")
