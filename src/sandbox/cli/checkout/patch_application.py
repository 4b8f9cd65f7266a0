"""Applies patches to the user's checkout with git, completely or not at all. Lists the changed files of patches."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from sandbox.cli.checkout.file_backup import FileBackup, backed_up
from sandbox.cli.checkout.user_checkout import SAFE_CONFIG, Checkout, fail_with_git_output, run_git
from sandbox.cli.output.patch_text import ChangedFile
from sandbox.cli.output.terminal_text import escape_name

APPLY_TIMEOUT_SECONDS = 3600.0
"""Timeout for git to apply a patch, including filters.

After this time, git is terminated and the files are restored.
"""

TERMINATE_GRACE_SECONDS = 10.0
"""How long git may take to release its locks after SIGTERM."""

_PATCH_REJECTED = 1
"""Exit code of git for a patch that does not apply; no file has been written."""


def apply_patch(checkout: Checkout, patch: Path, *, should_stage: bool = True, advice: str = "") -> list[ChangedFile]:
    """Apply a patch to the checkout's files, completely or not at all; return the changed files.

    advice: what to do if the patch cannot be applied.
    """
    index_options = ["--index"] if should_stage else []
    with backed_up(checkout.root, _git_directory(checkout), _patched_paths(checkout, patch)) as backup:
        code, stderr = _run_in_new_session(checkout.root, *_apply_arguments(*index_options, patch=patch))
        if code == _PATCH_REJECTED:
            backup.discard()
            fail_with_git_output("The patch does not apply to this checkout, so nothing was applied.", stderr, advice)
        if code:
            fail_with_git_output(_restore_backup(backup), stderr, advice)
        backup.discard()
        if backup.was_interrupted:
            click.echo("The patch is already applied.", err=True)
    return list_changed_files(checkout, patch)


def _git_directory(checkout: Checkout) -> Path:
    return Path(checkout.git_output("rev-parse", "--absolute-git-dir") or checkout.root / ".git")


def _patched_paths(checkout: Checkout, patch: Path) -> set[str]:
    """Return all paths that a patch writes or removes.

    Only the reversed patch contains the old names of renamed files.
    """
    completed_runs = [
        checkout.run_git(*_apply_arguments("--numstat", "-z", *back, patch=patch)) for back in ([], ["--reverse"])
    ]
    for one in completed_runs:
        if one.returncode:
            fail_with_git_output("The patch is malformed, so nothing was applied.", one.stderr)
    entries = [entry for one in completed_runs for entry in one.stdout.split(b"\0") if entry]
    return {os.fsdecode(entry.split(b"\t", 2)[2]) for entry in entries}


def list_changed_files(checkout: Checkout, patch: Path) -> list[ChangedFile]:
    """Return the changed files of a patch."""
    counted = checkout.run_git(*_apply_arguments("--numstat", "-z", patch=patch))
    return [_parse_numstat(entry) for entry in counted.stdout.split(b"\0") if entry]


def _run_in_new_session(directory: Path, *arguments: str) -> tuple[int, bytes]:
    """Run git in a separate session and return its exit code and stderr.

    In the same session, ^C could terminate git while it removes files.
    """
    process = subprocess.Popen(
        ["git", *SAFE_CONFIG, *arguments],  # noqa: S607
        cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    for seconds, number in ((APPLY_TIMEOUT_SECONDS, signal.SIGTERM), (TERMINATE_GRACE_SECONDS, signal.SIGKILL)):
        with suppress(subprocess.TimeoutExpired):
            stderr = process.communicate(timeout=seconds)[1]
            return process.returncode, stderr
        os.killpg(process.pid, number)
    return process.wait(TERMINATE_GRACE_SECONDS), b""


def _apply_arguments(*options: str, patch: Path) -> tuple[str, ...]:
    """Return arguments that make git ignore the user's whitespace configuration and apply the patch unchanged."""
    return ("apply", "--whitespace=nowarn", *options, "--", str(patch.resolve()))


def can_apply(checkout: Checkout, patch: Path, *, should_stage: bool) -> bool:
    """Return whether `apply_patch` would apply the patch. Changes nothing."""
    index_options = ["--index"] if should_stage else []
    return checkout.run_git(*_apply_arguments("--check", *index_options, patch=patch)).returncode == 0


def _restore_backup(backup: FileBackup) -> str:
    """Restore files that git may have written; return the error message about the failed patch."""
    failed = backup.restore()
    if failed:
        names = "".join(f"\n  {escape_name(path)}" for path in sorted(failed))
        copies = escape_name(str(backup.copies))
        return f"git did not apply the whole patch, and the copies in {copies} could not be restored:{names}"
    backup.discard()
    location_hint = (
        f" The replaced content is in {escape_name(str(backup.replaced))}." if backup.replaced.exists() else ""
    )
    return f"git did not apply the whole patch, so all files were restored.{location_hint}"


def read_changed_files(patch: Path) -> list[ChangedFile]:
    """Return the changed files of a patch, without a checkout. Exits with an error if git cannot parse the patch."""
    with TemporaryDirectory() as directory:  # in a checkout, git would ignore the files outside the current directory
        completed = run_git(Path(directory), _apply_arguments("--numstat", "-z", patch=patch))
    if completed.returncode:
        fail_with_git_output("git cannot read the patch.", completed.stderr)
    return [_parse_numstat(entry) for entry in completed.stdout.split(b"\0") if entry]


def _parse_numstat(entry: bytes) -> ChangedFile:
    added, removed, path = entry.decode(errors="replace").split("\t", 2)
    return ChangedFile(path, *(int(number) if number.isdecimal() else None for number in (added, removed)))
