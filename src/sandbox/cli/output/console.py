"""Rich consoles and messages; plain text if the stream is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

from sandbox.cli.output.terminal_text import terminal_width, wrap_text

if TYPE_CHECKING:
    from rich.console import Console

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
