"""The lock of a data directory, held by its server or by an administrative command while no server runs."""

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sandbox.bootstrap.private_directory import check_owner
from sandbox.model.errors import SandboxError

FORKED_LOCK_WAIT_SECONDS = 2.0
"""Maximum wait for the child process of a server that died just after a fork: the child holds the lock until exec."""

_OWNER_BYTES_MAX = 8192
_POLL_SECONDS = 0.02


class DataDirBusyError(SandboxError):
    """Another server is using this data directory, or the directory is a copy of another one."""

    code = "data_dir_busy"


@contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Lock a data directory exclusively; the lock ends with the process.

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
