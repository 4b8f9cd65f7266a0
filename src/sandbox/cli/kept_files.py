"""Files that git is about to write, kept until it is done: it removes all of them before it writes the first anew."""

from __future__ import annotations

import errno
import shutil
import signal
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import NamedTuple

_HELD_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE}


class _State(NamedTuple):
    inode: int
    size_bytes: int
    changed_ns: int


class KeptFiles:
    """What stood at some paths of a checkout: a copy of each file, or that there was none."""

    def __init__(self, root: Path, git_directory: Path, paths: Iterable[str]) -> None:
        self._root = root
        inside = [path for path in paths if _is_inside(root, path)]
        self._files = {path: state for path in inside if (state := _state(root / path))}
        self._absent = [path for path in inside if path not in self._files]
        parents = {parent for path in self._absent for parent in PurePosixPath(path).parents}
        self._new_directories = sorted(
            (root / parent for parent in parents if not (root / parent).is_dir()), reverse=True
        )
        self.is_needed = False
        self.place = Path(mkdtemp(prefix="sandbox-kept-", dir=git_directory))

    def copy(self) -> None:
        """Copy the files. Raises OSError."""
        for path in self._files:
            target = self.place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._root / path, target, follow_symlinks=False)

    def put_back(self) -> bool:
        """Make all as it was; gives whether anything was different. Raises OSError; the copies stay then."""
        self.is_needed = True
        made = [path for path in self._absent if _state(self._root / path)]
        for path in made:
            (self._root / path).unlink()
        for directory in self._new_directories:
            with suppress(OSError):  # it is not there, or somebody else has put something into it
                directory.rmdir()
        changed = [path for path, state in self._files.items() if _state(self._root / path) != state]
        for path in changed:
            target = self._root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(self.place / path, target)
        self.is_needed = False
        return bool(made or changed)


@contextmanager
def keeping(root: Path, git_directory: Path, paths: Iterable[str]) -> Iterator[KeptFiles]:
    """Keep files as long as the context lasts. Signals that would end it come after it. Raises OSError."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        kept = KeptFiles(root, git_directory, paths)
        try:
            kept.copy()
            yield kept
        finally:
            if not kept.is_needed:
                shutil.rmtree(kept.place, ignore_errors=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_inside(root: Path, path: str) -> bool:
    """Whether git would write there: not out of the checkout, not into its own directory, not through a link."""
    place = PurePosixPath(path)
    if place.is_absolute() or any(part == ".." or part.lower() == ".git" for part in place.parts):
        return False
    return not any((root / parent).is_symlink() for parent in list(place.parents)[:-1])


def _state(path: Path) -> _State | None:
    """None where there is no file and no link."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        return None
    return _State(found.st_ino, found.st_size, found.st_mtime_ns)


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)  # takes no room on a disk that is full
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        target.unlink(missing_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
