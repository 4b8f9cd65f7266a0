"""Wrapping of text to the window width. Text that a user may copy is not split."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sandbox.cli.output.status_line import StatusLine
from sandbox.cli.output.text import wrap_text

PROSE = "The server could not be reached, so nothing was done."


def test_words_are_not_split_and_the_next_line_is_indented():
    assert wrap_text(PROSE, 31, "  ") == ["The server could not be", "  reached, so nothing was done."]


def test_text_is_not_wrapped_without_a_terminal():
    assert wrap_text(PROSE * 10, None) == [PROSE * 10]


def test_empty_text_is_one_empty_line():
    assert wrap_text("", 40) == [""]


def test_word_wider_than_the_window_is_not_broken():
    path = "/" + "p" * 60
    assert wrap_text(f"See {path} and fix it.", 40) == ["See", path, "and fix it."]


def test_command_is_not_broken():
    assert wrap_text("It does not run. Start it with: sandbox serve", 40)[1] == "sandbox serve"


@pytest.mark.parametrize("width", [40, 41])
def test_wide_characters_count_twice_and_may_be_broken(width):
    lines = wrap_text("日本語" * 30, width)
    assert [cell_len(line) for line in lines[:-1]] == [40] * 4
    assert "".join(lines) == "日本語" * 30


def test_control_characters_are_escaped_before_measuring():
    assert wrap_text("\x1b[2J" * 8, 40) == [r"\x1b[2J" * 8]
    assert wrap_text("a\tb", 40) == ["a b"]


class BusyPrinter:
    """An event printer in the middle of a long command."""

    current_activity = "Bash  python3 -m pytest -q tests/integration/test_the_parser.py"
    totals = ("2 tool calls", "3,000 tokens in, 150 out", "$0.0112")


def test_status_line_in_a_narrow_window_keeps_the_cost():
    narrow, wide = (
        StatusLine(BusyPrinter(), Console(file=io.StringIO(), width=width)).__rich__().plain for width in (80, 140)
    )
    assert narrow.endswith("…  0 s · $0.0112") or narrow.endswith(".py  0 s · $0.0112")
    assert wide.endswith("test_the_parser.py  0 s · 2 tool calls · 3,000 tokens in, 150 out · $0.0112")
    assert max(cell_len(narrow), 40) <= 80
