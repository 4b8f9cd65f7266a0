"""Private directories, and checks of a data directory's owner and permissions."""

import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.model.errors import SandboxError

_SERVER_FILES = frozenset({"server.lock", "index.sqlite", "tokens.json", "profiles"})
"""A data directory used by a server, a restore, `sandbox token` or `sandbox profile` contains one of these entries."""

_FILE_SYSTEM_FILES = frozenset({"lost+found"})


class UnsafeDirectoryError(SandboxError):
    """A directory that must be private belongs to another user, or others can access it."""

    code = "unsafe_place"


@contextmanager
def private_umask() -> Iterator[None]:
    """Set a umask that denies other users access to files and directories created within the context."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def make_private_directory(directory: Path) -> Path:
    """Create a directory that only this user can access. Raises UnsafeDirectoryError, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_open_to_others(_require_own_directory(directory)):
        directory.chmod(0o700)
    return directory


def make_data_dir(directory: Path) -> Path:
    """Create a private data directory for a server. Raises the same errors as `check_usable_data_dir`."""
    check_usable_data_dir(directory)
    return make_private_directory(directory)


def check_usable_data_dir(directory: Path) -> None:
    """Check that a server may use this data directory. Changes nothing. Raises UnsafeDirectoryError, OSError.

    A directory that others can access is rejected if it is sticky (as /tmp is), or if it contains files but no data
    from a server. The server makes an accepted directory private.
    """
    try:
        check_owner(directory)
        status = _require_own_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    if _is_open_to_others(status) and (is_sticky or _has_foreign_files(directory)):
        message = (
            f"{directory} is accessible to other users and is not a Sandbox data directory; choose another --data-dir."
        )
        remedy = f" Or restrict it to this server: chmod 0700 {shlex.quote(str(directory))}"
        raise UnsafeDirectoryError(message if is_sticky else message + remedy)


def check_owner(directory: Path) -> None:
    """Check that this user owns a data directory. An owner could not use the files that another user creates in it.

    Raises UnsafeDirectoryError, OSError.
    """
    status = directory.stat()
    if status.st_uid != os.geteuid():
        remedy = f"run as its owner (sudo -u {_user_name(status.st_uid)}), or choose another"
        raise UnsafeDirectoryError(f"{directory} is not owned by this user; {remedy}.")


def _require_own_directory(directory: Path) -> os.stat_result:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UnsafeDirectoryError(f"{directory} is not owned by this user; remove it or choose another.")
    return status


def _user_name(uid: int) -> str:
    """Return the user in the form that sudo accepts."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"


def _is_open_to_others(status: os.stat_result) -> bool:
    return bool(status.st_mode & 0o077)


def _has_foreign_files(directory: Path) -> bool:
    names = {entry.name for entry in directory.iterdir()} - _FILE_SYSTEM_FILES
    return bool(names) and not names & _SERVER_FILES
