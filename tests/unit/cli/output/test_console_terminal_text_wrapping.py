"""Wrapping of text to the window width. Text that a user may copy is not split."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sandbox.cli.output.console import wrap_text
from sandbox.cli.output.status_line import StatusLine

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
    is_tool_running = True
    elapsed_seconds: float | None = 78.0
    totals = ("2 tool calls", "3,000 tokens in, 150 out", "$0.0112")


def test_status_line_in_a_narrow_window_keeps_the_cost():
    narrow, wide = (
        StatusLine(BusyPrinter(), Console(file=io.StringIO(), width=width)).__rich__().plain for width in (80, 160)
    )
    assert narrow.endswith("…  0 s · 1 min 18 s total · $0.0112")
    assert wide.endswith("_the_parser.py  0 s · 1 min 18 s total · 2 tool calls · 3,000 tokens in, 150 out · $0.0112")
    assert max(cell_len(narrow), 40) <= 80


@pytest.mark.parametrize(
    ("is_tool_running", "elapsed_seconds", "shown"),
    [(True, 18.0, "0 s · 18 s total"), (False, 18.0, "18 s"), (False, 3.9, "3 s"), (False, None, "0 s")],
)
def test_status_line_has_the_duration_of_a_tool_call_and_of_the_task(is_tool_running, elapsed_seconds, shown):
    activity = BusyPrinter()
    activity.current_activity, activity.totals = "working", ()
    activity.is_tool_running, activity.elapsed_seconds = is_tool_running, elapsed_seconds
    line = StatusLine(activity, Console(file=io.StringIO(), width=80)).__rich__().plain
    assert line.endswith(f" working  {shown}")
