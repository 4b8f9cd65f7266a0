"""Applies patches to the user's checkout with git, completely or not at all. Lists the changed files of patches.

Backs up files that git is about to write, because git removes all of them before it writes the first one.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, mkdtemp
from typing import NamedTuple

import click

from sandbox.cli.checkout.user_checkout import (
    NO_BARE_REPOSITORY,
    SAFE_CONFIG,
    Checkout,
    fail_with_git_output,
    run_git,
)
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name
from sandbox.cli.patches import ChangedFile
from sandbox.primitives.files import fold_name

_DEFERRED_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_DEFERRED_MESSAGE = b"\nInterrupted; the command ends when git has written the files.\n"


class _FileState(NamedTuple):
    inode: int
    size_bytes: int
    modified_ns: int


class FileBackup:
    """Backup of paths in a checkout: a copy of each file, stored in `copies`, and a list of the paths without a file.

    replaced: directory for files that a restore finds at these paths and that are not from the backup.
    was_interrupted: whether a signal was received and is deferred until the context ends.
    """

    def __init__(self, root: Path, git_directory: Path, paths: Collection[str]) -> None:
        self._root = root
        links = _find_links(root, paths)
        inside = [path for path in paths if _is_inside(path, paths, links)]
        self._states = {path: state for path in inside if (state := _file_state(root, path, links))}
        self._absent = [path for path in inside if path not in self._states]
        parents = _directories_above(self._absent)
        self._new_directories = sorted((root / one for one in parents if not _is_directory(root / one)), reverse=True)
        self.was_interrupted = False
        self._directory = Path(mkdtemp(prefix="sandbox-kept-", dir=git_directory))
        self.copies, self.replaced = self._directory / "copies", self._directory / "found"

    def create(self) -> None:
        """Copy the files. Raises OSError."""
        self.copies.mkdir()
        for path in self._states:
            target = self.copies / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._root / path, target, follow_symlinks=False)

    def restore(self) -> list[str]:
        """Restore as many paths as possible; return the others, whose copies are kept.

        Other files at these paths, such as the user's new changes, are moved to `replaced`, so they are never lost.
        """
        failed = []
        for path in self._absent:
            if self._state_now(path) and not self._move(self._root, self.replaced, path):
                failed.append(path)
        for directory in self._new_directories:
            with suppress(OSError):  # missing, or contains a file of another process
                directory.rmdir()
        for path, before in self._states.items():
            now = self._state_now(path)
            if now == before:
                (self.copies / path).unlink()
            elif (now and not self._move(self._root, self.replaced, path)) or not self._move(
                self.copies, self._root, path
            ):
                failed.append(path)
        return failed

    def _state_now(self, path: str) -> _FileState | None:
        return _file_state(self._root, path, _find_links(self._root, (path,)))

    def _move(self, source: Path, target: Path, path: str) -> bool:
        """Move a file; return whether that succeeded. Renames it if possible, because that needs no disk space."""
        try:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                (source / path).rename(target / path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.copy2(source / path, target / path, follow_symlinks=False)
                (source / path).unlink()
        except OSError:
            return False
        return True

    def discard(self) -> None:
        """Delete the copies."""
        shutil.rmtree(self.copies, ignore_errors=True)
        with suppress(OSError):  # keep replaced files for the user
            self._directory.rmdir()


@contextmanager
def backed_up(root: Path, git_directory: Path, paths: Collection[str]) -> Iterator[FileBackup]:
    """Back up files while the context is active; its body must call `discard`. Signals are deferred. Raises OSError."""
    backup = FileBackup(root, git_directory, paths)
    received_signals: list[int] = []

    def defer(number: int, _: object) -> None:
        received_signals.append(number)
        backup.was_interrupted = True
        with suppress(OSError):
            os.write(2, _DEFERRED_MESSAGE)

    before = {
        one: signal.signal(one, defer) for one in _DEFERRED_SIGNALS if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        try:
            backup.create()
        except BaseException:
            backup.discard()
            raise
        yield backup
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler or signal.SIG_DFL)
        if received_signals:
            signal.raise_signal(received_signals[0])


def _is_inside(path: str, paths: Collection[str], links: Collection[str]) -> bool:
    """Return whether git would write this path.

    It must be in the checkout, not in `.git`, and not under a symlink, except one that is in `paths`.
    """
    pure_path = PurePosixPath(path)
    if pure_path.is_absolute() or any(part == ".." or part.lower() == ".git" for part in pure_path.parts):
        return False
    return not links or all(parent in paths for parent in _parents(path) if parent in links)


def _find_links(root: Path, paths: Collection[str]) -> set[str]:
    """Return the directories above the paths that are symbolic links."""
    return {directory for directory in _directories_above(paths) if (root / directory).is_symlink()}


def _find_respelled_directories(paths: Collection[str]) -> list[tuple[str, str]]:
    """Return paths of a patch that other paths use as a directory in another spelling, with that spelling.

    On a file system that ignores case, git would write below such a path even if the patch makes it a symbolic link.
    """
    paths_by_name: dict[str, list[str]] = {}
    for path in paths:
        paths_by_name.setdefault(fold_name(path), []).append(path)
    return sorted(
        (path, directory)
        for directory in _directories_above(paths)
        for path in paths_by_name.get(fold_name(directory), ())
        if path != directory
    )


def _directories_above(paths: Collection[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        found.update(takewhile(lambda parent: parent not in found, _parents(path)))
    return found


def _parents(path: str) -> Iterator[str]:
    """Yield the directories above a path, innermost first, without the root."""
    while path := path.rpartition("/")[0]:
        yield path


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _file_state(root: Path, path: str, links: Collection[str]) -> _FileState | None:
    """Return the state of a file or symlink; None if the path does not exist or leads through a symlink."""
    if links and any(parent in links for parent in _parents(path)):
        return None
    try:
        file_stat = (root / path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (stat.S_ISREG(file_stat.st_mode) or stat.S_ISLNK(file_stat.st_mode)):
        return None
    return _FileState(file_stat.st_ino, file_stat.st_size, file_stat.st_mtime_ns)


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

    A patch that writes below a symbolic link is not applied: git follows links that it does not track.
    advice: what to do if the patch cannot be applied.
    """
    index_options = ["--index"] if should_stage else []
    paths = _patched_paths(checkout, patch)
    if links := _find_links(checkout.root, paths) - paths:
        names = ", ".join(map(escape_name, sorted(links)))
        fail(
            "Error: The patch writes files below a symbolic link in this checkout, so nothing was applied. "
            f"Remove or rename the link: {names}",
            ExitCode.CONFLICT,
        )
    if respelled := _find_respelled_directories(paths):
        names = ", ".join(f"{escape_name(path)} and {escape_name(directory)}/" for path, directory in respelled)
        fail(
            "Error: The patch has a file and a directory whose names differ only in case or in Unicode normalization, "
            f"so nothing was applied: {names}",
            ExitCode.CONFLICT,
        )
    with backed_up(checkout.root, _git_directory(checkout), paths) as backup:
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
        ["git", *NO_BARE_REPOSITORY, *SAFE_CONFIG, *arguments],  # noqa: S607
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
