"""Tables whose identifying columns are never truncated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from sandbox.cli.output.console import escape_name, wrap_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHRUNK_COLUMN_CELLS_MIN = 20
"""Width to which columns are truncated before a column is omitted."""

LEAST_IMPORTANT_COLUMN_CELLS = 16
"""Width to which the least important column is truncated before any other one is."""

MAIN_COLUMN_CELLS = 12
"""Width to which the most important column is truncated before another column is omitted."""

TRUNCATED_COLUMN_CELLS_MIN = 6
"""Minimum width of a truncated column, once no other column can be omitted."""

UNLIMITED_WIDTH_CELLS = 100_000

_NOTE_INDENT = "  "


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    has_border: bool,
    omittable: Sequence[str],
    never_truncated: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print rows with headings.

    has_border: draw a border.
    omittable: columns that are truncated, and then omitted, if the terminal is too narrow, in this order. If the
    output is not a terminal, no column is truncated. On a terminal, columns without any value are omitted.
    never_truncated: those omittable columns that are never truncated, and are omitted only if the most important column
    is at its minimum width.
    notes: a line for each row, printed below it; empty for none. A table with a border has no notes.
    """
    width = console.width
    if console.is_terminal:
        columns, rows = _drop_empty(columns, rows, omittable)
        columns, rows = fit_table(
            columns, rows, omittable, console.width, has_border=has_border, never_truncated=never_truncated
        )
    console.width = UNLIMITED_WIDTH_CELLS  # at the terminal's width, Rich would truncate every column, even ids
    if has_border:
        _print_bordered(console, columns, rows)
    else:
        for line, note in zip_longest(plain_lines(columns, rows), ("", *notes), fillvalue=""):
            console.print(line, soft_wrap=True)
            _print_note(console, note, width)


def _print_note(console: Console, note: str, width: int) -> None:
    from rich.text import Text

    for line in wrap_text(note, width - len(_NOTE_INDENT)) if note else ():
        console.print(Text(_NOTE_INDENT + line, "dim"), soft_wrap=True)


def fit_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    omittable: Sequence[str],
    width: int,
    *,
    has_border: bool = False,
    never_truncated: Sequence[str] = (),
    main_cells_min: int = MAIN_COLUMN_CELLS,
) -> tuple[Sequence[str], Sequence[Sequence[Text]]]:
    """Return the columns that fit, and their cells, truncated where necessary.

    main_cells_min: width to which the most important column, the last of `omittable`, is truncated before another one
    is omitted.
    """
    kept_columns = _fitting_columns(
        columns,
        rows,
        omittable,
        width,
        has_border=has_border,
        never_truncated=never_truncated,
        main_cells_min=main_cells_min,
    )
    rows = _select(kept_columns, columns, rows)
    truncatable = [name for name in omittable if name not in never_truncated]
    _shrink(kept_columns, rows, truncatable, width - _border_cells(kept_columns, has_border=has_border))
    return kept_columns, rows


def plain_lines(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[Text]:
    """Return the headings and the rows as lines with padded cells."""
    from rich.text import Text

    headings = [Text(name, "dim") for name in columns]
    widths = _widths(columns, rows)
    lines = []
    for row in (headings, *rows):
        for cell, width in zip(row[:-1], widths[:-1], strict=True):
            cell.pad_right(width - cell.cell_len)
        line = Text("  ").join(row)
        line.rstrip()
        lines.append(line)
    return lines


def cell(text: str, style: str = "") -> Text:
    """Create a cell of untrusted text, escaped and on one line."""
    from rich.text import Text

    return Text(escape_name(text.replace("\t", " ")), style)


def _select(kept_columns: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[list[Text]]:
    return [[cell for name, cell in zip(columns, row, strict=True) if name in kept_columns] for row in rows]


def _drop_empty(
    columns: Sequence[str], rows: Sequence[Sequence[Text]], omittable: Sequence[str]
) -> tuple[Sequence[str], Sequence[Sequence[Text]]]:
    kept_columns = [
        name for at, name in enumerate(columns) if name not in omittable or any(row[at].plain for row in rows)
    ]
    return kept_columns, _select(kept_columns, columns, rows)


def _print_bordered(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    from rich.table import Table

    table = Table()
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, crop=False)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[int]:
    return [max([len(name), *(row[at].cell_len for row in rows)]) for at, name in enumerate(columns)]


def _border_cells(columns: Sequence[str], *, has_border: bool) -> int:
    return 3 * len(columns) + 1 if has_border else 2 * (len(columns) - 1)


def _fitting_columns(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    omittable: Sequence[str],
    width: int,
    *,
    has_border: bool,
    never_truncated: Sequence[str],
    main_cells_min: int,
) -> list[str]:
    """Return the columns that fit once all columns that may be truncated are truncated."""
    widths = dict(zip(columns, _widths(columns, rows), strict=True))
    fixed_columns = [name for name in columns if name not in omittable]
    kept_columns = fixed_columns
    truncatable = [name for name in omittable if name not in never_truncated]
    for name in reversed([name for name in omittable if name in columns]):
        candidate = [*kept_columns, name]
        uses_least_widths = kept_columns == fixed_columns or name in never_truncated
        minimums = dict.fromkeys(
            truncatable, TRUNCATED_COLUMN_CELLS_MIN if uses_least_widths else SHRUNK_COLUMN_CELLS_MIN
        )
        minimums[omittable[-1]] = TRUNCATED_COLUMN_CELLS_MIN if uses_least_widths else main_cells_min
        needed = sum(min(widths[column], minimums.get(column, widths[column])) for column in candidate)
        if needed + _border_cells(candidate, has_border=has_border) <= width:
            kept_columns = candidate
    return [name for name in columns if name in kept_columns]


def _shrink(columns: Sequence[str], rows: Sequence[Sequence[Text]], truncatable: Sequence[str], width: int) -> None:
    """Truncate the least important column first, then the widest ones, which keeps narrow columns complete."""
    widths = dict(zip(columns, _widths(columns, rows), strict=True))
    excess = sum(widths.values()) - width
    shrunk = {name: widths[name] for name in columns if name in truncatable}
    if least := next((name for name in truncatable[:-1] if name in shrunk), ""):
        cells = min(max(shrunk[least] - LEAST_IMPORTANT_COLUMN_CELLS, 0), max(excess, 0))
        shrunk[least] -= cells
        excess -= cells
    for minimum, main_minimum in (
        (SHRUNK_COLUMN_CELLS_MIN, MAIN_COLUMN_CELLS),
        (TRUNCATED_COLUMN_CELLS_MIN, TRUNCATED_COLUMN_CELLS_MIN),
    ):
        minimums = dict.fromkeys(shrunk, minimum) | {truncatable[-1]: main_minimum}
        while excess > 0 and (wide := [name for name in shrunk if shrunk[name] > minimums[name]]):
            shrunk[max(wide, key=shrunk.__getitem__)] -= 1
            excess -= 1
    for at, name in enumerate(columns):
        for row in rows if shrunk.get(name, widths[name]) < widths[name] else ():
            row[at].truncate(shrunk[name], overflow="ellipsis")
