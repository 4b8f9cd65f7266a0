"""Formatting of durations, sizes and costs."""

import pytest

from sandbox.model.display_text import format_budget, format_cost, format_count, format_duration, format_size


@pytest.mark.parametrize(
    ("seconds", "formatted"),
    [
        (-1, "0 ms"),
        (0, "0 ms"),
        (0.012, "12 ms"),
        (0.1, "0.1 s"),
        (1.23, "1.2 s"),
        (42, "42 s"),
        (59.7, "1 min 0 s"),
        (125, "2 min 5 s"),
        (11520, "3 h 12 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d 0 h"),
        (4 * 86400 + 6 * 3600 + 59, "4 d 6 h"),
    ],
)
def test_duration_is_formatted_with_at_most_two_units(seconds: float, formatted: str):
    assert format_duration(seconds) == formatted


@pytest.mark.parametrize(
    ("size_bytes", "formatted"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 * 1024**2, "3.0 MiB"),
        (120 * 1024**2, "120 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2 * 1024**4, "2.0 TiB"),
        (5000 * 1024**4, "5,000 TiB"),
    ],
)
def test_size_is_formatted_with_a_binary_unit(size_bytes: int, formatted: str):
    assert format_size(size_bytes) == formatted


@pytest.mark.parametrize(
    ("usd", "formatted"),
    [
        (0, "$0.00"),
        (0.00001, "<$0.0001"),
        (0.015, "$0.0150"),
        (0.0374, "$0.0374"),
        (0.99, "$0.9900"),
        (0.99999, "$1.00"),
        (1, "$1.00"),
        (12.5, "$12.50"),
        (1234.5, "$1,234.50"),
    ],
)
def test_cost_is_formatted_in_dollars(usd: float, formatted: str):
    assert format_cost(usd) == formatted


def test_count_has_thousands_separators():
    assert [format_count(number) for number in (0, 999, 4153, 1_234_567)] == ["0", "999", "4,153", "1,234,567"]


@pytest.mark.parametrize(
    ("usd", "text"),
    [(0.5, "$0.50"), (2.5, "$2.50"), (3, "$3.00"), (0, "$0.00"), (0.005, "$0.005"), (1234.5, "$1,234.50")],
)
def test_budget_has_two_decimals_unless_it_has_more(usd, text):
    assert format_budget(usd) == text
