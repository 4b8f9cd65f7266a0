"""Tables in which what identifies a thing is never shortened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHRUNK_CELLS_MIN = 8
UNBOUNDED_CELLS = 100_000


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    has_lines: bool,
    shrinkable: Sequence[str],
) -> None:
    """Print rows under their headings.

    has_lines: draw a frame. shrinkable: the columns that may be cut on a terminal that is too narrow, the first one
    first; off a terminal nothing is cut.
    """
    frame_cells = 3 * len(columns) + 1 if has_lines else 2 * (len(columns) - 1)
    if console.is_terminal:
        _shrink(columns, rows, shrinkable, console.width - frame_cells)
    console.width = UNBOUNDED_CELLS  # in its own width Rich would cut every column, ids as well
    if has_lines:
        _print_framed(console, columns, rows)
    else:
        _print_plain(console, columns, rows)


def _print_framed(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    from rich.table import Table

    table = Table()
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, crop=False)


def _print_plain(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    from rich.text import Text

    headings = [Text(name, "dim") for name in columns]
    widths = _widths(columns, rows)
    for row in (headings, *rows):
        for cell, width in zip(row[:-1], widths[:-1], strict=True):
            cell.pad_right(width - cell.cell_len)
        console.print(Text("  ").join(row), soft_wrap=True)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[int]:
    return [max([len(name), *(row[at].cell_len for row in rows)]) for at, name in enumerate(columns)]


def _shrink(columns: Sequence[str], rows: Sequence[Sequence[Text]], shrinkable: Sequence[str], width: int) -> None:
    widths = _widths(columns, rows)
    excess = sum(widths) - width
    for at in map(columns.index, shrinkable):
        cut = max(min(excess, widths[at] - SHRUNK_CELLS_MIN), 0)
        excess -= cut
        for row in rows if cut else ():
            row[at].truncate(widths[at] - cut, overflow="ellipsis")
