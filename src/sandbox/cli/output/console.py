"""Where commands print for people: a Rich console that is plain off a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OFF_TERMINAL = 120
"""Where prose and summaries are cut when nobody's window says otherwise."""


def stdout_console(*, has_color: bool) -> Console:
    """The console of stdout, for data."""
    return _console(sys.stdout, has_color=has_color)


def stderr_console(*, has_color: bool) -> Console:
    """The console of stderr, for talk."""
    return _console(sys.stderr, has_color=has_color)


def _console(stream: TextIO, *, has_color: bool) -> Console:
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich's own way out is exit code 1: the task failed

    is_terminal = stream.isatty()
    return PipedConsole(
        file=stream,
        force_terminal=is_terminal,  # and not what variables such as FORCE_COLOR say
        color_system="auto" if is_terminal and has_color else None,
        width=None if is_terminal else WIDTH_OFF_TERMINAL,
        markup=False,  # names and output come from others
        highlight=False,
        emoji=False,
        soft_wrap=not is_terminal,
    )
