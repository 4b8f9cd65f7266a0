"""The files that a patch changes, one a line with how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sandbox.cli.checkout import ChangedFile
from sandbox.cli.figures import counted
from sandbox.cli.visible import visible_name

if TYPE_CHECKING:
    from rich.console import Console


def print_changes(changed: Sequence[ChangedFile], console: Console) -> None:
    """At least one file."""
    from rich.text import Text

    added_width, removed_width = (
        max(len(f"{number or 0}") + 1 for number in numbers)
        for numbers in zip(*((file.added, file.removed) for file in changed), strict=True)
    )
    for file in changed:
        numbers = (
            (f"+{file.added}".rjust(added_width), "green"),
            " ",
            (f"-{file.removed}".rjust(removed_width), "red"),
        )
        binary = (("binary".rjust(added_width + removed_width + 1), "dim"),)
        line = Text.assemble(*(binary if file.added is None else numbers), "  ", visible_name(file.path))
        console.print(line, soft_wrap=True)


def told_applied(files: int, *, is_staged: bool) -> str:
    """What is said of so many files that were changed, and how to look at them."""
    if is_staged:
        return f"Applied to {counted(files, 'file')} and staged. Look at it with: git diff --cached"
    return f"Applied to {counted(files, 'file')}, beside your own changes. Look at it with: git status"
