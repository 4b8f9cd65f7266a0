"""Text tables in wide and narrow windows."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from sandbox.cli.output.table import print_table

ID = "3f2c1d7e-2222-4222-8222-abcdefabcdef"


def print_lines(name: str, *, width: int, is_terminal: bool = True, has_border: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    rows = [[Text(ID), Text(name), Text("team=platform")], [Text("b"), Text("c"), Text("")]]
    print_table(console, ("ID", "NAME", "LABELS"), rows, has_border=has_border, omittable=("LABELS", "NAME"))
    return console.file.getvalue().splitlines()


def test_columns_align_with_headings():
    assert print_lines("日本", width=80) == [
        f"ID{' ' * 34}  NAME  LABELS",
        f"{ID}  日本  team=platform",
        f"b{' ' * 35}  c",
    ]


@pytest.mark.parametrize("has_border", [False, True])
def test_narrow_window_truncates_names_but_not_ids(has_border):
    lines = print_lines("n" * 100, width=70, has_border=has_border)
    assert max(map(len, lines)) <= 70
    assert any(ID in line and "n…" in line for line in lines)


def test_widest_column_shrinks_first():
    assert print_lines("n" * 100, width=90)[1] == f"{ID}  {'n' * 36}…  team=platform"


def test_least_important_column_shrinks_first():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    rows = [[Text("a"), Text("n" * 50), Text("l" * 24)]]
    print_table(console, ("ID", "NAME", "LABELS"), rows, has_border=False, omittable=("LABELS", "NAME"))
    assert console.file.getvalue().splitlines()[1] == f"a   {'n' * 37}…  {'l' * 15}…"


def test_column_is_dropped_before_a_more_important_one_becomes_unreadable(capsys):
    assert print_lines("n" * 100, width=65)[1] == f"{ID}  {'n' * 11}…  team=platform"
    assert print_lines("n" * 100, width=64)[1] == f"{ID}  {'n' * 25}…"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_border", [False, True])
def test_columns_are_dropped_in_a_very_narrow_window(has_border, capsys):
    lines = print_lines("n" * 100, width=52, has_border=has_border)
    assert max(map(len, lines)) <= 52
    assert any("NAME" in line for line in lines)
    assert not any("LABELS" in line for line in lines)
    assert capsys.readouterr().err == ""


def test_column_is_kept_if_dropping_it_does_not_help():
    console = Console(file=io.StringIO(), width=50, force_terminal=True, color_system=None)
    rows = [[Text(ID), Text("12 min"), Text("n" * 30)]]
    print_table(console, ("ID", "AGE", "NAME"), rows, has_border=False, omittable=("AGE", "NAME"))
    assert console.file.getvalue().splitlines()[-1] == f"{ID}  nnnnnnnnnnn…"
    console = Console(file=io.StringIO(), width=43, force_terminal=True, color_system=None)
    rows = [[Text(ID), Text("3 h"), Text("n" * 30)]]
    print_table(console, ("ID", "AGE", "NAME"), rows, has_border=False, omittable=("AGE", "NAME"))
    assert console.file.getvalue().splitlines()[-1] == f"{ID}  3 h"


def print_tasks(width: int, *, is_terminal: bool = True, labels: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    rows = [[Text(ID), Text("12 min"), Text("n" * 30), Text("+1 −2"), Text("$0.0895"), Text(labels)]]
    columns, omittable = (
        ("ID", "AGE", "NAME", "CHANGES", "COST", "LABELS"),
        ("LABELS", "CHANGES", "COST", "AGE", "NAME"),
    )
    print_table(console, columns, rows, has_border=False, omittable=omittable, never_truncated=("AGE", "COST"))
    return console.file.getvalue().splitlines()


def test_name_is_truncated_before_other_columns_are_omitted():
    assert print_tasks(61)[1] == f"{ID}  12 min  nnnnn…  $0.0895"
    assert print_tasks(60)[1] == f"{ID}  12 min  {'n' * 13}…"
    assert print_tasks(75)[1] == f"{ID}  12 min  {'n' * 19}…  $0.0895"  # CHANGES would leave 11 cells for the name
    assert print_tasks(76)[1] == f"{ID}  12 min  {'n' * 11}…  +1 −2    $0.0895"


def test_column_without_values_is_omitted_silently(capsys):
    assert "LABELS" not in print_tasks(140)[0]
    assert "LABELS" not in print_tasks(90)[0]
    assert capsys.readouterr().err == ""
    assert "LABELS" in print_tasks(140, labels="a=b")[0]
    assert "LABELS" in print_tasks(90, is_terminal=False)[0]


def test_id_is_not_truncated_in_a_window_that_is_too_narrow():
    assert any(line.startswith(ID) for line in print_lines("name", width=20))


def test_nothing_is_truncated_without_a_terminal():
    assert any("n" * 500 in line for line in print_lines("n" * 500, width=40, is_terminal=False))
