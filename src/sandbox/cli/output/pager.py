"""Shows lines with the pager that git uses for diffs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress

import click

GIT_TIMEOUT_SECONDS = 10.0
_TRUE_VALUES = {"", "true", "yes", "on", "1"}
_FALSE_VALUES = {"false", "no", "off", "0"}


def show_paged(lines: Iterable[str]) -> None:
    """Show lines on the terminal with git's pager for diffs: GIT_PAGER, pager.diff, core.pager, PAGER, or `less`."""
    pager = find_pager()
    if pager is None:
        for line in lines:
            click.echo(line, color=True)
        return
    # git's default options for less: show colors, and exit if the text fits on one screen
    environment = {"LESS": "FRX", "LV": "-c", **os.environ}
    # Use a shell, as git does: `diff-so-fancy | less` is a common value. This is safe, because only the user can set
    # the pager.
    paging = subprocess.Popen(["/bin/sh", "-c", pager], stdin=subprocess.PIPE, env=environment)
    try:
        assert paging.stdin is not None
        with suppress(BrokenPipeError), paging.stdin as stdin:  # the user may quit the pager early
            for line in lines:
                stdin.write(line.encode(errors="replace") + b"\n")
    finally:
        _wait_for_pager(paging)


def find_pager() -> str | None:
    """Return the pager's command line; None if git would not use a pager."""
    configured = _git_output("config", "--get", "pager.diff")
    if configured is not None and configured.lower() in _FALSE_VALUES:
        return None
    is_command = configured is not None and configured.lower() not in _TRUE_VALUES
    pager = configured if is_command and "GIT_PAGER" not in os.environ else _git_output("var", "GIT_PAGER")
    return None if pager in {None, "", "cat"} else pager


def _git_output(*arguments: str) -> str | None:
    """Return git's output; None if git fails or is not installed."""
    try:
        completed = subprocess.run(
            ["git", *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.decode(errors="replace").strip() if completed.returncode == 0 else None


def _wait_for_pager(paging: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            paging.wait()  # until the user quits it
        except KeyboardInterrupt:
            continue  # the pager, which shares the terminal, handles ^C
        return
