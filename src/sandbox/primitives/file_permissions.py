"""Permissions of files: private files, and access to files whose owner removed their permissions."""

import os
import stat
from pathlib import Path
from typing import IO

_PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_granting_access(
    name: str | bytes | Path, flags: int, directory: int | None = None, *, access_mode: int = os.X_OK
) -> int:
    """Open a file or directory under `directory`. If its owner cannot read it, grant the owner read permission.

    Agents may remove permissions from files that the caller owns.

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
