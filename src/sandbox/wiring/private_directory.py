"""Directories that nobody else enters."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.model.errors import SandboxError


class UnsafePlaceError(SandboxError):
    """A directory that must be private belongs to somebody else or lets others in."""

    code = "unsafe_place"


@contextmanager
def only_ours() -> Iterator[None]:
    """What is made meanwhile nobody else reads."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(directory: Path) -> Path:
    """Make a directory that only this user enters. Raises UnsafePlaceError, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UnsafePlaceError(f"{directory} is not this user's own directory; remove it or choose another.")
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    return directory
