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
    from rich.table import Table

    if console.is_terminal:
        frame = 3 * len(columns) + 1 if has_lines else 2 * (len(columns) - 1)
        _shrink(columns, rows, shrinkable, console.width - frame)
    table = Table() if has_lines else Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.width = UNBOUNDED_CELLS  # in its own width Rich would cut every column, ids as well
    console.print(table, crop=False, no_wrap=True)


def _shrink(columns: Sequence[str], rows: Sequence[Sequence[Text]], shrinkable: Sequence[str], width: int) -> None:
    widths = [max([len(name), *(row[at].cell_len for row in rows)]) for at, name in enumerate(columns)]
    excess = sum(widths) - width
    for at in map(columns.index, shrinkable):
        cut = max(min(excess, widths[at] - SHRUNK_CELLS_MIN), 0)
        excess -= cut
        for row in rows if cut else ():
            row[at].truncate(widths[at] - cut, overflow="ellipsis")
