"""The lock that makes its holder the one writer: `flock` on an open file description.

Whoever inherits the descriptor holds the lock too, and the kernel frees it when the last copy is closed.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

from sandbox.contracts.journal import JournalBusyError

_TRIES = 5
_PAUSE_SECONDS = 0.002


def take(path: Path, *, makes: bool = False) -> int:
    """Open and lock the file, or make it; gives the descriptor. Raises JournalBusyError, FileNotFoundError."""
    lock_fd = _open(path, os.O_CREAT if makes else 0)
    try:
        _lock(lock_fd, path)
        if not is_of(lock_fd, path):
            raise JournalBusyError(f"Somebody has just removed {path.parent}; try again.")
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def adopt(path: Path, lock_fd: int) -> None:
    """Make sure that an inherited descriptor is the lock of this journal, and keep it from this process's children.

    Raises OSError (EBADF) when it is another file, JournalBusyError when somebody else holds the lock.
    """
    if not is_of(lock_fd, path):
        raise OSError(errno.EBADF, f"Descriptor {lock_fd} is not the lock of this journal", str(path))
    os.set_inheritable(lock_fd, False)
    _lock(lock_fd, path)


def is_of(lock_fd: int, path: Path) -> bool:
    """A descriptor is of the file that is there now, and not of one that was removed. Raises FileNotFoundError."""
    return os.path.samestat(os.fstat(lock_fd), path.stat())


def is_held(path: Path) -> bool:
    """Somebody holds the lock at this moment."""
    try:
        lock_fd = _open(path)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(lock_fd, fcntl.LOCK_SH)
    finally:
        os.close(lock_fd)


def _open(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)


def _lock(lock_fd: int, path: Path) -> None:
    """A few tries, because `is_held` of another process has to take the lock for an instant to see it."""
    for _ in range(_TRIES):
        if _try_lock(lock_fd, fcntl.LOCK_EX):
            return
        time.sleep(_PAUSE_SECONDS)
    raise JournalBusyError(f"Somebody is writing {path.parent}; wait until that process has ended.")


def _try_lock(lock_fd: int, kind: int) -> bool:
    try:
        fcntl.flock(lock_fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
