"""Opening what an agent may have locked: its modes keep nobody out whose files they are."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_restricted(
    name: str | bytes | Path, flags: int, directory: int | None = None, *, access_mode: int = os.X_OK
) -> int:
    """Open a file or directory below `directory`, after giving its owner back the right to read it.

    rights: what else a directory is opened for (access(2)); where they are missing, its owner has all of them
    afterwards. Raises OSError.
    """
    try:
        opened = os.open(name, flags, dir_fd=directory)
    except PermissionError:
        _grant_read_access(name, directory)
        opened = os.open(name, flags, dir_fd=directory)
    try:
        if flags & os.O_DIRECTORY and not os.access(".", access_mode, dir_fd=opened):
            os.fchmod(opened, stat.S_IRWXU)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _grant_read_access(name: str | bytes | Path, directory: int | None) -> None:
    node = os.open(name, _PATH_FLAGS, dir_fd=directory)
    try:
        status = os.fstat(node)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            # A descriptor without rights to read takes no fchmod; its /proc name does, and is no other file's.
            needed_mode = stat.S_IRWXU if stat.S_ISDIR(status.st_mode) else stat.S_IRUSR
            Path(f"/proc/self/fd/{node}").chmod(stat.S_IMODE(status.st_mode) | needed_mode)
    finally:
        os.close(node)


def fsync_path(path: Path) -> None:
    """Bring a directory's entries, or a file's content, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(source: Path, target: Path) -> None:
    """Flush a file that is written and move it to its name, in place of whatever has it. Raises OSError."""
    fsync_path(source)
    source.rename(target)
    fsync_path(target.parent)


@contextmanager
def remove_on_failure(path: Path) -> Iterator[None]:
    """Where the block fails, what is there of the file goes: on a full disk others need its room until the next try."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def create_private_file(path: Path) -> IO[bytes]:
    """An empty file to write to, in place of whatever was there; a symbolic link is not followed. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")
