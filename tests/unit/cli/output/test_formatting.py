"""Formatting of durations, ages, sizes and costs."""

from datetime import UTC, datetime

import pytest

from sandbox.cli.output import formatting

NOW = datetime(2026, 1, 29, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "formatted"),
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
def test_format_duration(seconds, formatted):
    assert formatting.format_duration(seconds) == formatted


@pytest.mark.parametrize(
    ("timestamp", "formatted"),
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
def test_format_age(timestamp, formatted):
    assert formatting.format_age(timestamp, NOW) == formatted


@pytest.mark.parametrize(
    ("size_bytes", "formatted"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**2, "3.0 MiB"), (5 * 1024**3, "5.0 GiB")],
)
def test_format_size(size_bytes, formatted):
    assert formatting.format_size(size_bytes) == formatted


def test_small_costs_keep_their_digits():
    assert (formatting.format_cost(0.0374), formatting.format_cost(12.5)) == ("$0.0374", "$12.50")


def test_invalid_time_is_formatted_as_placeholder():
    for out_of_range in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert formatting.format_time(out_of_range) == "--:--:--"
    assert (
        formatting.format_time("nonsense"),
        formatting.format_datetime(None),
        formatting.format_elapsed(None, "x"),
    ) == ("--:--:--", "-", "")
