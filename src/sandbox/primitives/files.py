"""Creates, replaces and opens files: durably, privately, and despite missing permissions. Compares their names."""

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_NO_LINKS_ERRNOS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def fold_name(name: str) -> str:
    """Return a key that is equal for names that differ only in case or in Unicode normalization."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def fsync_path(path: Path) -> None:
    """Flush a directory's entries, or a file's content, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(source: Path, target: Path) -> None:
    """Flush a written file and rename it to its target, replacing an existing file. Raises OSError."""
    fsync_path(source)
    source.rename(target)
    fsync_path(target.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write and flush a file, atomically replacing an existing file. Raises OSError."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    replace_durably(part, path)


@contextmanager
def remove_on_failure(path: Path) -> Iterator[None]:
    """Remove a partly written file if the block fails: on a full disk, the next attempt needs the file's space."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def try_link(file: Path, name: Path) -> bool:
    """Create a hard link; return False if the disk does not support links. Raises OSError."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in _NO_LINKS_ERRNOS:
            raise
        return False
    return True


_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_granting_access(
    name: str | bytes | Path, flags: int, directory: int | None = None, *, access_mode: int = os.X_OK
) -> int:
    """Open a file or directory under `directory`. If access is denied, first grant its owner access.

    Agents may remove permissions from files that the caller owns. The owner of a file gets read permission, and the
    owner of a directory all permissions.

    access_mode: access(2) permissions that are needed for a directory. If one is missing, the directory's owner gets
        all permissions.

    Raises OSError.
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
            # fchmod fails on an O_PATH descriptor; chmod through its /proc path works and cannot affect another file.
            needed_mode = stat.S_IRWXU if stat.S_ISDIR(status.st_mode) else stat.S_IRUSR
            Path(f"/proc/self/fd/{node}").chmod(stat.S_IMODE(status.st_mode) | needed_mode)
    finally:
        os.close(node)


def create_private_file(path: Path) -> IO[bytes]:
    """Create an empty file (mode 0600), truncating an existing one. Does not follow symbolic links.

    Raises OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")
