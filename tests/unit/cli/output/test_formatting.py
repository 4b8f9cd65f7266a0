"""Formatting of times and ages."""

from datetime import UTC, datetime

import pytest

from sandbox.cli.output import formatting

NOW = datetime(2026, 1, 29, 12, 0, tzinfo=UTC)


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
def test_age_is_formatted_in_one_unit(timestamp, formatted):
    assert formatting.format_age(timestamp, NOW) == formatted


def test_invalid_time_is_formatted_as_placeholder():
    for out_of_range in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert formatting.format_time(out_of_range) == "--:--:--"
    assert (
        formatting.format_time("nonsense"),
        formatting.format_datetime(None),
        formatting.format_elapsed(None, "x"),
    ) == ("--:--:--", "-", "")
