"""Escapes untrusted text for terminals, and wraps text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import TextIO

from sandbox.model.printable import escape_character, replace_invisible, replace_unprintable


def escape_text(text: str) -> str:
    r"""Escape control and invisible characters in prose: ESC becomes `\x1b`. Tabs are kept."""
    return replace_invisible(text, escape_character, "\t")


def escape_name(name: str) -> str:
    """Escape all unprintable characters in a name or path, so that no two names look the same."""
    return replace_unprintable(name, escape_character)


def escape_json(value: object) -> str:
    """Format JSON with indentation, escaped for terminals; the parsed value is unchanged."""
    return replace_invisible(
        json.dumps(value, indent=2, ensure_ascii=False), lambda hidden: json.dumps(hidden)[1:-1], "\n"
    )


COLUMN_CELLS_MIN = 20
"""Minimum width of a column; in a narrower window, lines may exceed the width."""

_WORD = re.compile(r"\s*(?:sandbox(?: task)? \S+|\S+)|\s+\Z")
"""Matches a word; `sandbox` and its subcommand count as one word, so that they stay on the same line."""


def terminal_width(stream: TextIO) -> int | None:
    """Return the width of the terminal that `stream` writes to; None for a file or a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # not a terminal, or no file descriptor
        return None


def terminal_height(stream: TextIO) -> int | None:
    """Return the number of lines of the terminal that `stream` writes to; None for a file or a pipe."""
    try:
        return os.get_terminal_size(stream.fileno()).lines or None
    except (OSError, ValueError):
        return None


def wrap_text(text: str, width_cells: int | None, hanging: str = "") -> list[str]:
    """Escape and wrap `text`; all lines but the first begin with `hanging`. width_cells: None for one line."""
    escaped = escape_text(text).expandtabs(1)
    if width_cells is None:
        return [escaped]
    from rich.cells import cell_len

    width_left = max(width_cells - cell_len(hanging), COLUMN_CELLS_MIN)
    lines: list[str] = []
    line, cells = "", 0
    for piece in _wrap_units(escaped):
        if line.strip() and cells + cell_len(piece.rstrip()) > width_left + (0 if lines else cell_len(hanging)):
            lines.append(line.rstrip())
            line, cells, piece = "", 0, piece.lstrip()  # noqa: PLW2901
        line += piece
        cells += cell_len(piece)
    return [f"{hanging if number else ''}{line_text}" for number, line_text in enumerate([*lines, line.rstrip()])]


def _wrap_units(text: str) -> Iterator[str]:
    """Split at possible line breaks: words with their leading spaces, and double-width characters."""
    from rich.cells import cell_len

    for word in _WORD.findall(text):
        yield from re.findall(r"\s*\S", word) if cell_len(word) > len(word) else [word]
