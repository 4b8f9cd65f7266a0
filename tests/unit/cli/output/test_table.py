"""Tables for people, wide and narrow."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from sandbox.cli.output.table import print_table

ID = "3f2c1d7e-2222-4222-8222-abcdefabcdef"


def printed(name: str, *, width: int, is_terminal: bool = True, has_lines: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    rows = [[Text(ID), Text(name), Text("team=platform")], [Text("b"), Text("c"), Text("")]]
    print_table(console, ("ID", "NAME", "LABELS"), rows, has_border=has_lines, shrinkable=("LABELS", "NAME"))
    return console.file.getvalue().splitlines()


def test_columns_stand_below_their_headings():
    assert printed("日本", width=80) == [
        f"ID{' ' * 34}  NAME  LABELS",
        f"{ID}  日本  team=platform",
        f"b{' ' * 35}  c",
    ]


@pytest.mark.parametrize("has_lines", [False, True])
def test_in_a_narrow_window_names_give_way_and_ids_do_not(has_lines):
    lines = printed("n" * 100, width=70, has_lines=has_lines)
    assert max(map(len, lines)) <= 70
    assert any(ID in line and "n…" in line for line in lines)


def test_the_widest_column_gives_way_first():
    assert printed("n" * 100, width=90)[1] == f"{ID}  {'n' * 36}…  team=platform"


@pytest.mark.parametrize("has_lines", [False, True])
def test_where_there_is_no_room_even_for_shortened_names_columns_are_left_out(has_lines, capsys):
    lines = printed("n" * 100, width=52, has_lines=has_lines)
    assert max(map(len, lines)) <= 52
    assert any("NAME" in line for line in lines)
    assert not any("LABELS" in line for line in lines)
    assert capsys.readouterr().err == "The window is too narrow for LABELS.\n"


def test_a_column_that_does_not_help_by_going_stays():
    console = Console(file=io.StringIO(), width=50, force_terminal=True, color_system=None)
    rows = [[Text(ID), Text("12 min"), Text("n" * 30)]]
    print_table(console, ("ID", "AGE", "NAME"), rows, has_border=False, shrinkable=("AGE", "NAME"))
    assert console.file.getvalue().splitlines()[-1] == f"{ID}  nnnnnnnnnnn…"
    console = Console(file=io.StringIO(), width=45, force_terminal=True, color_system=None)
    rows = [[Text(ID), Text("12 min"), Text("n" * 30)]]
    print_table(console, ("ID", "AGE", "NAME"), rows, has_border=False, shrinkable=("AGE", "NAME"))
    assert console.file.getvalue().splitlines()[-1] == f"{ID}  12 min"


def test_an_id_is_whole_even_where_the_window_is_too_narrow_for_it():
    assert any(line.startswith(ID) for line in printed("name", width=20))


def test_off_a_terminal_nothing_is_cut():
    assert any("n" * 500 in line for line in printed("n" * 500, width=40, is_terminal=False))
