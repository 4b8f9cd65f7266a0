"""Collects the local changes of a checkout in a patch, which is sent with the task."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from sandbox.cli.checkout.patch_application import list_changed_files
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.output.terminal_text import escape_name, terminal_width, wrap_text
from sandbox.model.formatting import format_size
from sandbox.model.manifest.field_formats import GIT_PATCH_BYTES_MAX

if TYPE_CHECKING:
    from sandbox.cli.checkout.user_checkout import Checkout
    from sandbox.cli.output.patch_text import ChangedFile

LISTED_FILES_MAX = 10
CHANGED_BYTES_MAX = 256 * 1024**2
"""Maximum total size of the changed files.

It exceeds the patch's limit, because the change to a large file may be small.
"""

_TOO_LARGE_HINT = "  Commit and push it, or exclude large files: .gitignore"


def create_local_patch(checkout: Checkout, commit: str) -> bytes:
    """Create a patch with the changes between `commit` and the working tree, and print the names of the changed files.

    The patch is empty if nothing has changed. Ignored files are excluded. Exits with an error if the patch is too large
    to send.
    """
    sizes = checkout.changed_file_sizes()
    _reject_nested_repositories(checkout, sizes)
    _reject_oversized(sizes)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "patch"
        checkout.write_diff(commit, path, Path(directory))
        if path.stat().st_size > GIT_PATCH_BYTES_MAX:
            actual_size, size_limit = format_size(path.stat().st_size), format_size(GIT_PATCH_BYTES_MAX)
            fail(
                f"Error: The patch with the local changes is {actual_size}; the limit is {size_limit}.\n"
                f"{_TOO_LARGE_HINT}",
                ExitCode.CONFLICT,
            )
        patch = path.read_bytes()
        if patch:
            _print_files(list_changed_files(checkout, path))
        return patch


def _reject_nested_repositories(checkout: Checkout, paths: Iterable[str]) -> None:
    """Fail if there are changes in nested repositories, which a patch of this repository cannot contain."""
    if submodules := checkout.changed_submodules():
        message = f"Error: The submodule {escape_name(submodules[0])} has uncommitted changes, which cannot be sent."
        fail(f"{message}\n  Commit and push them there, or stash them there: git stash -u", ExitCode.CONFLICT)
    if nested := sorted(path for path in paths if path.endswith("/")):
        message = f"Error: {escape_name(nested[0])} is a separate git repository, which cannot be sent."
        fail(f"{message}\n  Exclude it: .gitignore", ExitCode.CONFLICT)


def _reject_oversized(sizes: Mapping[str, int]) -> None:
    """If the changed files are too large to send, fail before git reads them."""
    if sum(sizes.values()) > CHANGED_BYTES_MAX:
        largest = max(sizes, key=sizes.__getitem__)
        actual_size, size_limit = format_size(sum(sizes.values())), format_size(GIT_PATCH_BYTES_MAX)
        message = f"Error: The local changes are {actual_size}; the limit is {size_limit}. "
        largest_hint = f"The largest is {escape_name(largest)} ({format_size(sizes[largest])})."
        fail(f"{message}{largest_hint}\n{_TOO_LARGE_HINT}", ExitCode.CONFLICT)


def _print_files(files: list[ChangedFile]) -> None:
    names = [escape_name(file.path) for file in files[:LISTED_FILES_MAX]]
    more = [f"{len(files) - len(names):,} more"] if len(files) > len(names) else []
    line = f"Including local changes in {pluralize(len(files), 'file')}: {', '.join([*names, *more])}."
    click.echo("\n".join(wrap_text(line, terminal_width(sys.stderr), "  ")), err=True)
