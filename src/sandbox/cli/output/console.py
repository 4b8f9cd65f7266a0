"""Output to the console: escaped and wrapped text, messages, JSON, and Rich consoles.

Plain text if the stream is not a terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from sandbox.model.display_text import escape_character, replace_invisible, replace_unprintable

if TYPE_CHECKING:
    from rich.console import Console


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


WIDTH_OFF_TERMINAL = 120
"""Width to which text is wrapped or truncated if the stream is not a terminal."""


NO_COLOR_KEY = "sandbox.no_color"
"""The key of the `--no-color` option in click's `Context.meta`."""


def is_color_enabled() -> bool:
    """Return whether `--no-color` and NO_COLOR are both unset."""
    ctx = click.get_current_context(silent=True)
    return not (os.environ.get("NO_COLOR") or (ctx is not None and ctx.meta.get(NO_COLOR_KEY)))


def stdout_console(*, has_color: bool) -> Console:
    """Return the console of stdout, for data."""
    return _console(sys.stdout, has_color=has_color)


def stderr_console(*, has_color: bool) -> Console:
    """Return the console of stderr, for messages."""
    return _console(sys.stderr, has_color=has_color)


def _console(stream: TextIO, *, has_color: bool) -> Console:
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich would exit with code 1, which means that the task failed

    is_terminal = stream.isatty()
    return PipedConsole(
        file=stream,
        force_terminal=is_terminal,  # ignores variables such as FORCE_COLOR
        color_system="auto" if is_terminal and has_color else None,
        width=None if is_terminal else WIDTH_OFF_TERMINAL,
        markup=False,  # names and output are untrusted
        highlight=False,
        emoji=False,
        soft_wrap=not is_terminal,
    )


_ERROR_PREFIX = "Error:"


def print_message(message: str) -> None:
    """Print the message on stderr. On a terminal, lines that are not indented are wrapped."""
    width = terminal_width(sys.stderr)
    lines = [part for line in message.split("\n") for part in (_wrap_line(line, width) if line[:1] != " " else [line])]
    click.echo("\n".join(lines), err=True)


def _wrap_line(line: str, width_cells: int | None) -> list[str]:
    lines = wrap_text(line, width_cells, "  ")
    if width_cells is not None and lines[0].startswith(_ERROR_PREFIX) and is_color_enabled():
        lines[0] = click.style(_ERROR_PREFIX, fg="red", bold=True) + lines[0].removeprefix(_ERROR_PREFIX)
    return lines


@contextmanager
def activity_line(text: str) -> Iterator[None]:
    """Show a line on stderr until the context ends, if stderr is a terminal that can erase the line."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print an API response as JSON."""
    click.echo(escape_json(value))


def print_json_lines(events: Iterable[Mapping[str, Any]]) -> str | None:
    """Print events as they arrive, one per line; return the final state, or None if the events end without one."""
    state = None
    for event in events:
        click.echo(json.dumps(event, ensure_ascii=sys.stdout.isatty()))
        if event.get("type") == "end":
            state = str(event.get("state"))
    return state
