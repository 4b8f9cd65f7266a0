"""Patches on the command line: downloads, rejection of secrets, changed files, line counts, and the user's pager."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text
from sandbox.cli.output.formatting import pluralize
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.client import Client
    from sandbox.client.response_types import Artifact, Task


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
        change = "changed"  # the patch contains only the difference, so its size is not the file's
    mode = fields.get("new file mode") or fields.get("new mode") or ""
    if mode.endswith("755"):
        change += ", executable"
    elif "new mode" in fields:
        change += f", mode {mode}"
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
    """Show lines on the terminal with git's pager for diffs: GIT_PAGER, pager.diff, core.pager, PAGER, or `less`.

    Only the configuration of the user and the machine counts. The current directory may be a repository from someone
    else, whose configuration could name any program.
    """
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
            cwd="/",
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


def reject_secrets(entries: Iterable[Artifact], *, allows_secrets: bool, advice: str = "add --allow-secrets") -> None:
    """Exit with an error if an artifact contains a secret and `--allow-secrets` was not given.

    advice: how to allow the download.
    """
    names = [escape_name(entry["name"]) for entry in entries if entry["contains_secret"] and not allows_secrets]
    if names:
        contain = "contains a secret of the task and was" if len(names) == 1 else "contain secrets and were"
        message = f"Error: {', '.join(names)} {contain} skipped."
        fail(f"{message}\n  Download it anyway: {advice}", ExitCode.REFUSED)


CHAIN_HELP = "Include the changes of the earlier tasks that this task continues."
"""Help text for the --chain option."""

REMARKS_MAX = 50
"""Maximum number of remarks to print; a server writes fewer."""

_CHAIN_PATCH = ".sandbox/{}.chain.patch"


def fetch_patch(
    client: Client,
    task_id: str,
    target: Path,
    *,
    allows_secrets: bool,
    secrets_advice: str = "add --allow-secrets",
    is_chain: bool = False,
) -> None:
    """Download the task's patch to the file `target` and verify it. Exits with an error if there is none.

    is_chain: download the patch that includes the changes from all tasks in the chain that this task continues.
    """
    path = _CHAIN_PATCH.format(task_id) if is_chain else f".sandbox/{task_id}.patch"
    entries = _patch_entries(client, task_id, path)
    has_ended = not entries and client.status(task_id)["state"] in FINAL_STATES
    if has_ended:
        entries = _patch_entries(client, task_id, path)  # the patch may have been stored in the meantime
    if not entries:
        escaped = escape_text(task_id)
        if has_ended:
            message = f"Error: Task {escaped} has no patch: it ended without one."
            fail(f"{message}\n  See why: sandbox task status {escaped}", ExitCode.NOT_FOUND)
        message = f"Error: Task {escaped} has no patch yet; it is created when the agent has ended."
        fail(f"{message}\n  Wait for it: sandbox task wait {escaped}", ExitCode.NOT_FOUND)
    reject_secrets(entries, allows_secrets=allows_secrets, advice=secrets_advice)
    client.download(task_id, path, target)


def find_chain_patch(client: Client, task_id: str) -> Artifact | None:
    """Return the patch of a task's whole chain: the changes of the task and of earlier tasks. None if there is none."""
    return next(iter(_patch_entries(client, task_id, _CHAIN_PATCH.format(task_id))), None)


def _patch_entries(client: Client, task_id: str, path: str) -> list[Artifact]:
    return [entry for entry in client.artifacts(task_id)["artifacts"] if entry["path"] == path]


def print_omissions(client: Client, task_id: str, patch: Path) -> None:
    """Print what the server left out of a patch and where to find it."""
    remarks = list(islice(takewhile(_is_remark, patch_lines(patch)), REMARKS_MAX))
    if not remarks:
        return
    lines = ["Not everything is in the patch:", *(f"  {escape_text(line[2:])}" for line in remarks)]
    name = f"{task_id}.changes.tar"
    if any(entry["path"] == f".sandbox/{name}" for entry in client.artifacts(task_id)["artifacts"]):
        lines.append(f"  Download all new and changed files: sandbox task download {escape_text(f'{task_id} {name}')}")
    click.echo("\n".join(lines), err=True)


def has_diff(patch: Path) -> bool:
    """Return whether a patch has anything that git can apply."""
    return not all(map(_is_remark, patch_lines(patch)))


def _is_remark(line: str) -> bool:
    return line.startswith("# ")


COUNTED_PATCH_BYTES_MAX = 8 * 1024 * 1024
"""Maximum size of a patch that is downloaded only to count its lines."""


def chain_changes_summary(client: Client, task: Task) -> str:
    """Return what the task and the earlier tasks of its chain changed in total, such as `+31 −4 in 3 files`.

    Empty if the task does not continue another one, or if the number of lines cannot be determined.
    """
    from sandbox.client import ClientError

    if task.get("parent") is None or task["state"] not in FINAL_STATES:
        return ""
    try:
        entry = find_chain_patch(client, task["id"])
        if entry is None or entry["contains_secret"] or entry["size_bytes"] > COUNTED_PATCH_BYTES_MAX:
            return ""
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            client.download(task["id"], entry["path"], patch)
            return format_line_counts(patch_lines(patch))
    except ClientError:
        return ""  # the size is only additional information
