"""What only this checkout has (changes, new files, commits that are not pushed) as a patch upon a pushed commit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail
from sandbox.cli.figures import counted, size
from sandbox.cli.visible import visible, visible_name
from sandbox.cli.wrapping import window_cells, wrapped
from sandbox.model.manifest_formats import GIT_PATCH_BYTES_MAX

if TYPE_CHECKING:
    from sandbox.cli.checkout import ChangedFile, Checkout

SHOWN_FILES_MAX = 10
CHANGED_BYTES_MAX = 256 * 1024**2
"""Of files, of which a large one may be changed a little only."""

_ADVICE = "  Commit and push it, or keep large files out of it: .gitignore"


def pack_local_work(checkout: Checkout, commit: str) -> bytes:
    """The patch that makes what is here of `commit`, empty where that is the same; says what is in it.

    Ignored files stay. Ends the command where it is more than can be sent.
    """
    sizes = checkout.sizes_of_changes()
    _refuse_other_repositories(checkout, sizes)
    _refuse_far_too_much(sizes)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "patch"
        checkout.write_difference(commit, path, Path(directory))
        if path.stat().st_size > GIT_PATCH_BYTES_MAX:
            found, most = size(path.stat().st_size), size(GIT_PATCH_BYTES_MAX)
            fail(
                f"Error: What is only here makes a patch of {found}, and {most} can be sent.\n{_ADVICE}",
                ExitCode.CONFLICT,
            )
        patch = path.read_bytes()
        if patch:
            _say_files(checkout.list_changes(path))
        return patch


def _refuse_other_repositories(checkout: Checkout, paths: Iterable[str]) -> None:
    """What is inside of them is in no patch of this one."""
    if submodules := checkout.changed_submodules():
        message = (
            f"Error: The submodule {visible_name(submodules[0])} has changes of its own, which cannot be sent along."
        )
        fail(f"{message}\n  Commit and push them there, or put them aside there with: git stash -u", ExitCode.CONFLICT)
    if nested := sorted(path for path in paths if path.endswith("/")):
        message = f"Error: {visible_name(nested[0])} is a git repository of its own, which cannot be sent along."
        fail(f"{message}\n  Keep it out of this one: .gitignore", ExitCode.CONFLICT)


def _refuse_far_too_much(sizes: Mapping[str, int]) -> None:
    """Before git reads it all: so much makes no patch that could be sent."""
    if sum(sizes.values()) > CHANGED_BYTES_MAX:
        largest = max(sizes, key=sizes.__getitem__)
        found, most = size(sum(sizes.values())), size(GIT_PATCH_BYTES_MAX)
        message = f"Error: What is only here is {found}, and a patch of {most} can be sent. "
        largest_told = f"The largest is {visible_name(largest)} ({size(sizes[largest])})."
        fail(f"{message}{largest_told}\n{_ADVICE}", ExitCode.CONFLICT)


def _say_files(files: list[ChangedFile]) -> None:
    names = [file.path for file in files[:SHOWN_FILES_MAX]]
    more = [f"{len(files) - len(names):,} more"] if len(files) > len(names) else []
    line = f"With {counted(len(files), 'file')} as they are here: {', '.join([*names, *more])}."
    click.echo("\n".join(wrapped(visible(line), window_cells(sys.stderr), "  ")), err=True)
