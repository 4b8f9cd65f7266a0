"""Writes files durably: flushes, replaces and removes whole files, and creates hard links."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LINKS_ERRNOS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


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
