"""Patches on the terminal: their text, the changed files in them, and the pager that git uses for diffs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandbox.cli.output.console import escape_name, escape_text
from sandbox.cli.output.formatting import pluralize

if TYPE_CHECKING:
    from rich.console import Console


_HUNK = re.compile(r"@@ -[0-9]+(?:,([0-9]{1,9}))? \+[0-9]+(?:,([0-9]{1,9}))? @@")
_INDEX_LINE = re.compile(r"\Aindex ([0-9a-f]{10})[0-9a-f]{30,54}\.\.([0-9a-f]{10})[0-9a-f]{30,54}")
_FILE_HEADER = "diff --git "
_HEADER_LINES_MAX = 20
_BINARY_CONTENT = re.compile(r"(literal|delta) [0-9]{1,19}")
_BOLD, _RED, _GREEN, _CYAN, _RESET = "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[36m", "\x1b[m"


@dataclass(frozen=True)
class ChangedFile:
    """One file of a patch. `added` and `removed` count lines, and are None for a binary file."""

    path: str
    added: int | None
    removed: int | None


def print_changed_files(
    changed: Sequence[ChangedFile], console: Console, *, has_total: bool = False, listed_max: int | None = None
) -> None:
    """Print one line per changed file; requires at least one file.

    has_total: also print the totals, as git does. listed_max: maximum number of files to list; None lists all.
    """
    from rich.text import Text

    added_width, removed_width = (
        max(len(f"{number or 0}") + 1 for number in numbers)
        for numbers in zip(*((file.added, file.removed) for file in changed), strict=True)
    )
    for file in changed[:listed_max]:
        numbers = (
            (f"+{file.added}".rjust(added_width), "green"),
            " ",
            (f"-{file.removed}".rjust(removed_width), "red"),
        )
        binary = (("binary".rjust(added_width + removed_width + 1), "dim"),)
        line = Text.assemble(*(binary if file.added is None else numbers), "  ", escape_name(file.path))
        console.print(line, soft_wrap=True)
    if listed_max is not None and (more := len(changed) - listed_max) > 0:
        console.print(f"… {pluralize(more, 'more file')}")
    if has_total:
        console.print(_total_line(changed), soft_wrap=True)


def _total_line(changed: Sequence[ChangedFile]) -> str:
    added, removed = sum(file.added or 0 for file in changed), sum(file.removed or 0 for file in changed)
    parts = [f"{pluralize(len(changed), 'file')} changed"]
    if added or not removed:
        parts.append(f"{pluralize(added, 'insertion')}(+)")
    if removed or not added:
        parts.append(f"{pluralize(removed, 'deletion')}(-)")
    return ", ".join(parts)


def applied_message(files: int, *, is_staged: bool) -> str:
    """Describe how many files changed, and how to view the changes."""
    if is_staged:
        return f"Applied to {pluralize(files, 'file')} and staged. See the changes with: git diff --cached"
    return f"Applied to {pluralize(files, 'file')}, on top of your changes. See them with: git status"


def patch_lines(patch: Path) -> Iterator[str]:
    """Iterate over the lines as git splits them: a carriage return is part of a line.

    Bytes that are not UTF-8 become surrogates, which are escaped in names.
    """
    with patch.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def format_line_counts(lines: Iterable[str]) -> str:
    """Return the size of a patch, such as `+31 −4 in 3 files`; empty if it changes no file."""
    files = added = removed = old_lines_left = new_lines_left = 0
    for line in lines:
        hunk = _HUNK.match(line)
        if old_lines_left > 0 or new_lines_left > 0:
            added += line[:1] == "+"
            removed += line[:1] == "-"
            old_lines_left -= line[:1] not in {"+", "\\"}
            new_lines_left -= line[:1] not in {"-", "\\"}
        elif hunk:
            old_lines_left, new_lines_left = int(hunk[1] or 1), int(hunk[2] or 1)
        else:
            files += line.startswith("diff --git ")
    return f"+{added:,} −{removed:,} in {pluralize(files, 'file')}" if files else ""


def summarize_binary_files(lines: Iterable[str]) -> Iterator[str]:
    """Replace each binary file's part of a patch with one line: `Binary file x: added, 377 bytes`.

    All other lines are unchanged. Outside hunks, no line of a text file begins with one of git's headers.
    """
    headers: list[str] = []
    sizes: list[str] | None = None  # the headers of the encoded contents; None outside a binary file
    for line in lines:
        if line.startswith(_FILE_HEADER):
            yield from headers if sizes is None else (_binary_summary(headers, sizes),)
            headers, sizes = [line], None
        elif sizes is not None:
            sizes += [line] if _BINARY_CONTENT.fullmatch(line) else []
        elif headers and line == "GIT binary patch":
            sizes = []
        elif headers and len(headers) < _HEADER_LINES_MAX and not line.startswith(("@@", "# ")):
            headers.append(line)
        else:
            yield from headers
            headers = []
            yield line
    yield from headers if sizes is None else (_binary_summary(headers, sizes),)


def _binary_summary(headers: Sequence[str], contents: Sequence[str]) -> str:
    """Describe a binary file. contents: the headers of its new and its old content, such as `literal 377`."""
    path = headers[0].removeprefix(_FILE_HEADER)
    old, new = path[: len(path) // 2], path[len(path) // 2 + 1 :]
    if old.replace("a/", "b/", 1) == new:
        path = new.replace("b/", "", 1)
    fields = {key: value for key, _, value in (line.rpartition(" ") for line in headers[1:])}
    path = next((line.removeprefix("rename to ") for line in headers if line.startswith("rename to ")), path)
    (new_kind, _, new_bytes), (old_kind, _, old_bytes) = (line.partition(" ") for line in (*contents[:2], "", "")[:2])
    if "new file mode" in fields:
        change = f"added, {new_bytes} bytes"
    elif "deleted file mode" in fields:
        change = f"deleted, {old_bytes} bytes"
    elif new_kind == old_kind == "literal":
        change = f"changed, {old_bytes} to {new_bytes} bytes"
    else:
        change = "changed"  # the patch contains only the difference, whose size says little
    return f"Binary file {path}: {change}"


def colorize(lines: Iterable[str], *, has_color: bool) -> Iterator[str]:
    """Escape the lines of a patch for the terminal and add git's colors."""
    old_lines_left = new_lines_left = 0
    for line in lines:
        hunk = _HUNK.match(line)
        if old_lines_left > 0 or new_lines_left > 0:
            # Count the lines of the hunk, because a removed line that begins with `-- ` looks like a file header.
            style = {"-": _RED, "+": _GREEN}.get(line[:1], "")
            old_lines_left -= line[:1] not in {"+", "\\"}
            new_lines_left -= line[:1] not in {"-", "\\"}
        elif hunk:
            style, old_lines_left, new_lines_left = _CYAN, int(hunk[1] or 1), int(hunk[2] or 1)
        else:
            style = "" if line.startswith("\\") else _BOLD
        escaped = _escape_header(line) if style == _BOLD else escape_text(_replace_invalid_bytes(line))
        yield f"{style}{escaped}{_RESET}" if has_color and style and escaped else escaped


def _escape_header(line: str) -> str:
    """Escape a line outside a hunk as a name, because it may contain paths. Git adds a tab to a path with spaces."""
    return escape_name(_INDEX_LINE.sub(r"index \1..\2", line).removesuffix("\t"))


def _replace_invalid_bytes(line: str) -> str:
    return line if line.isascii() else line.encode(errors="surrogateescape").decode(errors="replace")


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
