"""Text that a task brought along, made harmless for a terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import TextIO

from sandbox.model.printable import escape_character, replace_invisible, replace_unprintable


def escape_text(text: str) -> str:
    r"""Prose with what would steer a terminal, or not show, written out: ESC as `\x1b`. Tabs stay."""
    return replace_invisible(text, escape_character, "\t")


def escape_name(name: str) -> str:
    """A name or path with everything written out that does not show, so that no two look alike."""
    return replace_unprintable(name, escape_character)


def escape_json(value: object) -> str:
    """JSON for people and programs, indented, harmless on a terminal and still the same value."""
    return replace_invisible(
        json.dumps(value, indent=2, ensure_ascii=False), lambda hidden: json.dumps(hidden)[1:-1], "\n"
    )


COLUMN_CELLS_MIN = 20
"""A narrower column is not worth having; in a window of such a width lines may be too long."""

_WORD = re.compile(r"\s*(?:sandbox(?: task)? \S+|\S+)|\s+\Z")
"""The beginning of a command stays together too."""


def terminal_width(stream: TextIO) -> int | None:
    """How wide the terminal is that `stream` writes to; None for a file or a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # what is no terminal, and what has no descriptor at all
        return None


def wrap_text(text: str, width_cells: int | None, hanging: str = "") -> list[str]:
    """The lines of `text`, harmless on a terminal; all but the first begin with `hanging`. No width: one line."""
    escaped = escape_text(text).expandtabs(1)
    if width_cells is None:
        return [escaped]
    from rich.cells import cell_len

    room = max(width_cells - cell_len(hanging), COLUMN_CELLS_MIN)
    lines: list[str] = []
    line, cells = "", 0
    for piece in _wrap_units(escaped):
        if line.strip() and cells + cell_len(piece.rstrip()) > room + (0 if lines else cell_len(hanging)):
            lines.append(line.rstrip())
            line, cells, piece = "", 0, piece.lstrip()  # noqa: PLW2901
        line += piece
        cells += cell_len(piece)
    return [f"{hanging if number else ''}{line_text}" for number, line_text in enumerate([*lines, line.rstrip()])]


def _wrap_units(text: str) -> Iterator[str]:
    """What may stand at the end of a line: words with the spaces before them, and characters of double width."""
    from rich.cells import cell_len

    for word in _WORD.findall(text):
        yield from re.findall(r"\s*\S", word) if cell_len(word) > len(word) else [word]
