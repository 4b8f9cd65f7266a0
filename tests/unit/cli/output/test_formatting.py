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


def test_shortened_ids_are_unique_in_their_list():
    first, second = "5e173eb5-58f6-4bd5-9b43-6f1d6ab4f6a0", "5e173eb5-5a2c-4f0e-8f37-5a2b2d0f9c11"
    alone = "77aa0000-0d2c-4f0e-8f37-5a2b2d0f9c11"
    shortened = formatting.shorten_ids([first, alone, second, first])
    assert shortened == {first: "5e173eb5-58", second: "5e173eb5-5a", alone: "77aa0000"}


def test_ids_that_a_user_chose_are_not_shortened_and_differ_from_shortened_ids():
    generated = "5e173eb5-58f6-4bd5-9b43-6f1d6ab4f6a0"
    chosen = ["5e173eb5", "fix-the-flaky-login-of-the-dashboard"]
    assert formatting.shorten_ids([generated, *chosen]) == {generated: "5e173eb5-", **{each: each for each in chosen}}
    assert formatting.shorten_ids([]) == {}
