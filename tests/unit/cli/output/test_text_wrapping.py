"""Prose in a window: broken between words, and what is to be copied in one piece."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sandbox.cli.output.status_line import StatusLine
from sandbox.cli.output.text import wrap_text

PROSE = "The server could not be reached, so nothing was done."


def test_words_stay_whole_and_the_rest_hangs():
    assert wrap_text(PROSE, 31, "  ") == ["The server could not be", "  reached, so nothing was done."]


def test_off_a_terminal_nothing_is_broken():
    assert wrap_text(PROSE * 10, None) == [PROSE * 10]


def test_no_text_is_one_empty_line():
    assert wrap_text("", 40) == [""]


def test_what_is_wider_than_the_window_is_not_broken_for_it_could_not_be_copied():
    path = "/" + "p" * 60
    assert wrap_text(f"See {path} and mend it.", 40) == ["See", path, "and mend it."]


def test_a_command_stays_together():
    assert wrap_text("It does not run. Start it with: sandbox serve", 40)[1] == "sandbox serve"


@pytest.mark.parametrize("width", [40, 41])
def test_characters_of_double_width_are_counted_and_may_be_parted(width):
    lines = wrap_text("日本語" * 30, width)
    assert [cell_len(line) for line in lines[:-1]] == [40] * 4
    assert "".join(lines) == "日本語" * 30


def test_what_steers_a_terminal_is_written_out_before_it_is_measured():
    assert wrap_text("\x1b[2J" * 8, 40) == [r"\x1b[2J" * 8]
    assert wrap_text("a\tb", 40) == ["a b"]


class Busy:
    """A story in the middle of a long command."""

    current_activity = "Bash  python3 -m pytest -q tests/integration/test_the_parser.py"
    totals = ("2 tool calls", "3,000 tokens in, 150 out", "$0.0112")


def test_in_a_narrow_window_what_goes_on_has_half_of_the_line_and_the_price_stays():
    narrow, wide = (
        StatusLine(Busy(), Console(file=io.StringIO(), width=width)).__rich__().plain for width in (80, 140)
    )
    assert narrow.endswith("…  0 s · $0.0112") or narrow.endswith(".py  0 s · $0.0112")
    assert wide.endswith("test_the_parser.py  0 s · 2 tool calls · 3,000 tokens in, 150 out · $0.0112")
    assert max(cell_len(narrow), 40) <= 80
