"""Files that this room writes for others: private, and on disk before anybody hears of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def create(path: Path) -> IO[bytes]:
    """An empty file to write to, in place of whatever was there; a symbolic link is not followed. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on disk. Raises OSError."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def removing_unless_done(path: Path) -> Iterator[None]:
    """Where the block fails, what is there of the file goes: on a full disk others need its room until the next try."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
