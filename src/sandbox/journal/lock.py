"""The lock that makes its holder the one writer: `flock` on an open file description.

Whoever inherits the descriptor holds the lock too, and the kernel frees it when the last copy is closed.
"""

import errno
import fcntl
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.journal import JournalBusyError

_LOCK_ATTEMPTS = 5
_PAUSE_SECONDS = 0.002


def acquire(path: Path, *, create: bool = False) -> int:
    """Open and lock the file, or make it; gives the descriptor. Raises JournalBusyError, FileNotFoundError."""
    lock_fd = _open(path, os.O_CREAT if create else 0)
    try:
        _lock(lock_fd, path)
        if not is_lock_of(lock_fd, path):
            raise JournalBusyError(f"Somebody has just removed {path.parent}; try again.")
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def adopt(path: Path, lock_fd: int) -> None:
    """Make sure that an inherited descriptor is the lock of this journal, and keep it from this process's children.

    Raises OSError (EBADF) when it is another file, JournalBusyError when somebody else holds the lock.
    """
    if not is_lock_of(lock_fd, path):
        raise OSError(errno.EBADF, f"Descriptor {lock_fd} is not the lock of this journal", str(path))
    os.set_inheritable(lock_fd, False)
    _lock(lock_fd, path)


def is_lock_of(lock_fd: int, path: Path) -> bool:
    """A descriptor is of the file that is there now, and not of one that was removed. Raises FileNotFoundError."""
    return os.path.samestat(os.fstat(lock_fd), path.stat())


def is_locked(path: Path) -> bool:
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
    for _ in range(_LOCK_ATTEMPTS):
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


RUNNER_MODULES = frozenset({b"sandbox.bootstrap.runner", b"sandbox.wiring.runner"})
"""Every runner has one of these arguments; other holders of the lock have neither. The second is of version 0.1."""


def kill_lock_holder(lock: Path) -> bool:
    """KILL every other process that is a runner and holds the exclusive lock of this file; whether there was one."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    killed = [pid for pid in pids if pid != os.getpid() and _kill_if_holding(pid, found)]
    return bool(killed)


def _kill_if_holding(pid: int, lock: os.stat_result) -> bool:
    if not _holds_lock(pid, lock):
        return False
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at again, now that no later process of the same id can be meant.
            if _holds_lock(pid, lock):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _holds_lock(pid: int, lock: os.stat_result) -> bool:
    place = Path("/proc", str(pid))
    try:
        if RUNNER_MODULES.isdisjoint((place / "cmdline").read_bytes().split(b"\0")):
            return False
        descriptors = os.listdir(place / "fdinfo")  # noqa: PTH208
    except OSError:
        return False
    return any(_descriptor_holds_lock(place, descriptor, lock) for descriptor in descriptors)


def _descriptor_holds_lock(proc_directory: Path, descriptor: str, lock: os.stat_result) -> bool:
    """By the descriptor itself: fdinfo's device is the file system's, which overlayfs and btrfs give no file.

    One that is closed meanwhile is not: the others tell.
    """
    try:
        # proc(5): a line for each lock that comes with the descriptor.
        lines = (proc_directory / "fdinfo" / descriptor).read_text().splitlines()
        is_exclusive = any(line.startswith("lock:") and " FLOCK " in line and " WRITE " in line for line in lines)
        return is_exclusive and os.path.samestat((proc_directory / "fd" / descriptor).stat(), lock)
    except OSError:
        return False
