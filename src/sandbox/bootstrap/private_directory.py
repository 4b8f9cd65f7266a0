"""Directories that nobody else enters."""

import errno
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.model.errors import SandboxError

_SERVER_FILES = frozenset({"server.lock", "index.sqlite", "tokens.json", "profiles"})
"""One of these is in every data directory that a server, a restored backup, a first token or profile has made."""

_FILE_SYSTEM_FILES = frozenset({"lost+found"})


class UnsafeDirectoryError(SandboxError):
    """A directory that must be private belongs to somebody else, or others use it."""

    code = "unsafe_place"


@contextmanager
def private_umask() -> Iterator[None]:
    """What is made meanwhile nobody else reads."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def make_private_directory(directory: Path) -> Path:
    """Make a directory that only this user enters. Raises UnsafePlaceError, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_open_to_others(_require_own_directory(directory)):
        directory.chmod(0o700)
    return directory


def make_data_dir(directory: Path) -> Path:
    """Make a server's data directory, private. Raises as `refuse_foreign` does."""
    check_usable_data_dir(directory)
    return make_private_directory(directory)


def check_usable_data_dir(directory: Path) -> None:
    """Look whether a server may make this its data directory, and change nothing. Raises UnsafePlaceError, OSError.

    One that others use would be closed to them: it is taken only when it is empty, or holds a server's data already.
    """
    try:
        check_owner(directory)
        status = _require_own_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    is_anybodys = bool(status.st_mode & stat.S_ISVTX)
    if _is_open_to_others(status) and (is_anybodys or _has_foreign_files(directory)):
        message = f"{directory} is open to other users and is no data directory of Sandbox; choose another --data-dir."
        remedy = f" Or, if it is to be this server's alone: chmod 0700 {shlex.quote(str(directory))}"
        raise UnsafeDirectoryError(message if is_anybodys else message + remedy)


def check_owner(directory: Path) -> None:
    """Of a data directory: what would be made there its own user could not use. Raises UnsafePlaceError, OSError."""
    status = directory.stat()
    if status.st_uid != os.geteuid():
        remedy = f"work as its user (sudo -u {_user_name(status.st_uid)}), or choose another"
        raise UnsafeDirectoryError(f"{directory} is not this user's own directory; {remedy}.")


def _require_own_directory(directory: Path) -> os.stat_result:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UnsafeDirectoryError(f"{directory} is not this user's own directory; remove it or choose another.")
    return status


def _user_name(uid: int) -> str:
    """As sudo knows who it is."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"


def _is_open_to_others(status: os.stat_result) -> bool:
    return bool(status.st_mode & 0o077)


def _has_foreign_files(directory: Path) -> bool:
    names = {entry.name for entry in directory.iterdir()} - _FILE_SYSTEM_FILES
    return bool(names) and not names & _SERVER_FILES


_UNSUPPORTED_ERRNOS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def try_link(file: Path, name: Path) -> bool:
    """Give a file a second name; False where its disk has no hard links. Raises OSError."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise
        return False
    return True
