"""Private directories of servers, runners and workers: the data directory with its lock, and the run directory.

Runners import this module, so each of its imports slows their start.
"""

import fcntl
import hashlib
import os
import pwd
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


_USER_RUNTIME_ROOT = Path("/run/user")
"""Parent of the runtime directories of logged-in users (pam_systemd(8))."""

_SHARED_ROOT = Path("/tmp")  # noqa: S108  (see `_run_dir_candidates`)
"""A directory in which any user can create files. It exists even if the user has no login session."""


def choose_run_dir(data_dir: Path) -> Path:
    """Return a short, private directory for sockets, one per data directory.

    A Unix socket's path can have at most 107 bytes. The name is derived from the data directory's inode, not from its
    path, so a server finds its live runners even if it is started with another path to the same directory. Raises
    UnsafeDirectoryError, OSError.
    """
    status = data_dir.stat()
    name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:12]
    candidates = _run_dir_candidates()
    # XDG_RUNTIME_DIR differs between login sessions, so first look for the directory of an earlier server's runners.
    parent = next((candidate for candidate in candidates if (candidate / name).is_dir()), candidates[0])
    make_private_directory(parent)
    return make_private_directory(parent / name)


def _run_dir_candidates() -> Sequence[Path]:
    """Return candidate directories, best first.

    Any user could create the one in /tmp first, so it is left out if it belongs to another user. Raises
    UnsafeDirectoryError if no other candidate exists.
    """
    user = os.geteuid()
    if user == 0:
        return (Path("/run/sandbox"),)
    runtime_dir, usual = os.environ.get("XDG_RUNTIME_DIR"), _USER_RUNTIME_ROOT / str(user)
    shared = _SHARED_ROOT / f"sandbox-{user}"
    preferred = (Path(runtime_dir) / "sandbox",) if runtime_dir else ()
    if not _belongs_to_another_user(shared):
        return (*preferred, shared, usual / "sandbox")
    if not preferred and not usual.is_dir():
        remedy = "remove it, or set XDG_RUNTIME_DIR to a directory of this user"
        raise UnsafeDirectoryError(f"{shared} belongs to another user; {remedy}.")
    return (*preferred, usual / "sandbox")


def _belongs_to_another_user(path: Path) -> bool:
    try:
        return path.lstat().st_uid != os.geteuid()
    except FileNotFoundError:
        return False


FORKED_LOCK_WAIT_SECONDS = 2.0
"""Maximum wait for the child process of a server that died just after a fork: the child holds the lock until exec."""

_OWNER_BYTES_MAX = 8192
_POLL_SECONDS = 0.02


class DataDirBusyError(SandboxError):
    """Another process is using this data directory, or the directory is a copy of another one."""

    code = "data_dir_busy"


@contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Lock a data directory exclusively. The lock is released when the process exits.

    The directory itself is locked, regardless of its path. A program that removes old temporary files could remove a
    lock file, but not this lock. The `server.lock` file identifies the holder and the directory. A copy of a data
    directory is rejected: it contains the same attempts as the original, so a server on the copy would end the running
    ones. Raises DataDirBusyError, UnsafeDirectoryError if another user owns the directory, OSError.
    """
    check_owner(data_dir)
    with ExitStack() as opened:
        directory = _open(opened, data_dir, os.O_RDONLY | os.O_DIRECTORY)
        file = _open(opened, data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        for descriptor in (directory, file):
            _lock(descriptor, data_dir, os.pread(file, 32, 0))
        _check_not_copy(data_dir, os.pread(file, _OWNER_BYTES_MAX, 0))
        os.ftruncate(file, 0)
        os.pwrite(file, _encode_owner(data_dir), 0)
        yield


def _lock(descriptor: int, data_dir: Path, owner: bytes) -> None:
    deadline = time.monotonic() + FORKED_LOCK_WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _is_owner_dead(owner) or time.monotonic() > deadline:
                raise DataDirBusyError(_busy_message(data_dir, owner)) from None
        time.sleep(_POLL_SECONDS)


def _is_owner_dead(owner: bytes) -> bool:
    try:
        os.kill(int(owner.partition(b"\n")[0]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, OSError):
        pass
    return False


def _encode_owner(data_dir: Path) -> bytes:
    status = data_dir.stat()
    return f"{os.getpid()}\n{status.st_dev} {status.st_ino}\n".encode() + os.fsencode(data_dir.resolve())


def _check_not_copy(data_dir: Path, owner: bytes) -> None:
    """Reject a copy. A moved directory is not a copy, because its old path no longer exists."""
    try:
        _, recorded_identity, path = owner.split(b"\n", 2)
        original = Path(os.fsdecode(path))
        status = original.stat()
    except (ValueError, OSError):
        return
    has_original = (
        recorded_identity == f"{status.st_dev} {status.st_ino}".encode() and (original / "server.lock").exists()
    )
    if has_original and not os.path.samestat(status, data_dir.stat()):
        raise DataDirBusyError(
            f"{data_dir} is a copy of {original}; a server that uses it would end the original's running tasks. "
            "Create copies with 'sandbox admin backup' and 'sandbox admin restore'. "
            "Or, if no task of the original is running: rm "
            f"{shlex.quote(str(data_dir / 'server.lock'))}"
        )


def _open(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _busy_message(data_dir: Path, owner: bytes) -> str:
    owner_line = owner.decode(errors="replace").partition("\n")[0]
    process = f"The server with process id {owner_line}" if owner_line.isdigit() else "Another server"
    return f"{process} uses {data_dir}; stop it or choose another --data-dir."
