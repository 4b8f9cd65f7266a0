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

_OF_SERVERS = frozenset({"server.lock", "index.sqlite", "tokens.json", "profiles"})
"""One of these is in every data directory that a server, a restored backup, a first token or profile has made."""

_OF_FILE_SYSTEMS = frozenset({"lost+found"})


class UnsafePlaceError(SandboxError):
    """A directory that must be private belongs to somebody else, or others use it."""

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
    if _lets_others_in(_own_directory(directory)):
        directory.chmod(0o700)
    return directory


def make_data_dir(directory: Path) -> Path:
    """Make a server's data directory, private. Raises as `refuse_foreign` does."""
    refuse_foreign(directory)
    return make_private(directory)


def refuse_foreign(directory: Path) -> None:
    """Look whether a server may make this its data directory, and change nothing. Raises UnsafePlaceError, OSError.

    One that others use would be closed to them: it is taken only when it is empty, or holds a server's data already.
    """
    try:
        refuse_anothers(directory)
        found = _own_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    is_anybodys = bool(found.st_mode & stat.S_ISVTX)
    if _lets_others_in(found) and (is_anybodys or _holds_something_else(directory)):
        message = f"{directory} is open to other users and is no data directory of Sandbox; choose another --data-dir."
        mend = f" Or, if it is to be this server's alone: chmod 0700 {shlex.quote(str(directory))}"
        raise UnsafePlaceError(message if is_anybodys else message + mend)


def refuse_anothers(directory: Path) -> None:
    """Of a data directory: what would be made there its own user could not use. Raises UnsafePlaceError, OSError."""
    found = directory.stat()
    if found.st_uid != os.geteuid():
        mend = f"work as its user (sudo -u {_user(found.st_uid)}), or choose another"
        raise UnsafePlaceError(f"{directory} is not this user's own directory; {mend}.")


def _own_directory(directory: Path) -> os.stat_result:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UnsafePlaceError(f"{directory} is not this user's own directory; remove it or choose another.")
    return found


def _user(uid: int) -> str:
    """As sudo knows who it is."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"'#{uid}'"


def _lets_others_in(found: os.stat_result) -> bool:
    return bool(found.st_mode & 0o077)


def _holds_something_else(directory: Path) -> bool:
    names = {entry.name for entry in directory.iterdir()} - _OF_FILE_SYSTEMS
    return bool(names) and not names & _OF_SERVERS


_HAS_NONE = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def try_link(file: Path, name: Path) -> bool:
    """Give a file a second name; False where its disk has no hard links. Raises OSError."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in _HAS_NONE:
            raise
        return False
    return True
