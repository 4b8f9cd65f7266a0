"""The journal lock, which makes its holder the only writer: `flock` on an open file description.

A process that inherits the descriptor also holds the lock. The kernel releases the lock when the last copy of the
descriptor is closed.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

from sandbox.interfaces.journal import JournalBusyError

_LOCK_TRIES = 5
_PAUSE_SECONDS = 0.002


def acquire(path: Path, *, create: bool = False) -> int:
    """Open (or create) and lock the file; return the descriptor. Raises JournalBusyError, FileNotFoundError."""
    lock_fd = _open(path, os.O_CREAT if create else 0)
    try:
        _lock(lock_fd, path)
        if not is_lock_of(lock_fd, path):
            raise JournalBusyError(f"Another process has just removed {path.parent}; try again.")
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def adopt(path: Path, lock_fd: int) -> None:
    """Check that an inherited descriptor is the lock of this journal, and make it non-inheritable.

    Raises OSError (EBADF) if it refers to another file, JournalBusyError if another process holds the lock.
    """
    if not is_lock_of(lock_fd, path):
        raise OSError(errno.EBADF, f"Descriptor {lock_fd} is not the lock of this journal", str(path))
    os.set_inheritable(lock_fd, False)
    _lock(lock_fd, path)


def is_lock_of(lock_fd: int, path: Path) -> bool:
    """Return whether a descriptor refers to the current file, not to one that was removed. Raises FileNotFoundError."""
    return os.path.samestat(os.fstat(lock_fd), path.stat())


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock now."""
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
    """Lock the file. Tries several times, because `is_locked` in another process may hold the lock briefly."""
    for _ in range(_LOCK_TRIES):
        if _try_lock(lock_fd, fcntl.LOCK_EX):
            return
        time.sleep(_PAUSE_SECONDS)
    raise JournalBusyError(f"Another process is writing {path.parent}; wait until that process has ended.")


def _try_lock(lock_fd: int, kind: int) -> bool:
    try:
        fcntl.flock(lock_fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
