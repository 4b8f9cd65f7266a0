"""Backs up files that git is about to write, because git removes all of them before it writes the first one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import NamedTuple

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
        inside = [path for path in paths if _is_inside(root, path, paths)]
        self._states = {path: state for path in inside if (state := _file_state(root, path))}
        self._absent = [path for path in inside if path not in self._states]
        parents = {str(parent) for path in self._absent for parent in PurePosixPath(path).parents}
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
            if _file_state(self._root, path) and not self._move(self._root, self.replaced, path):
                failed.append(path)
        for directory in self._new_directories:
            with suppress(OSError):  # missing, or contains a file of another process
                directory.rmdir()
        for path, before in self._states.items():
            now = _file_state(self._root, path)
            if now == before:
                (self.copies / path).unlink()
            elif (now and not self._move(self._root, self.replaced, path)) or not self._move(
                self.copies, self._root, path
            ):
                failed.append(path)
        return failed

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


def _is_inside(root: Path, path: str, paths: Collection[str]) -> bool:
    """Return whether git would write this path.

    It must be in the checkout, not in `.git`, and not under a symlink, except one that is in `paths`.
    """
    pure_path = PurePosixPath(path)
    if pure_path.is_absolute() or any(part == ".." or part.lower() == ".git" for part in pure_path.parts):
        return False
    return all(str(link) in paths for link in _links_above(root, path))


def _links_above(root: Path, path: str) -> list[PurePosixPath]:
    return [parent for parent in list(PurePosixPath(path).parents)[:-1] if (root / parent).is_symlink()]


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _file_state(root: Path, path: str) -> _FileState | None:
    """Return the state of a file or symlink; None if the path does not exist or leads through a symlink."""
    if _links_above(root, path):
        return None
    try:
        file_stat = (root / path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (stat.S_ISREG(file_stat.st_mode) or stat.S_ISLNK(file_stat.st_mode)):
        return None
    return _FileState(file_stat.st_ino, file_stat.st_size, file_stat.st_mtime_ns)
