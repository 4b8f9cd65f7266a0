"""The journal lock, which makes its holder the only writer: `flock` on an open file description.

A process that inherits the descriptor also holds the lock. The kernel releases it when the last copy is closed.
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
    """Check that an inherited descriptor is the lock of this journal, and do not pass it on to child processes.

    Raises OSError (EBADF) if it is another file, JournalBusyError if another process holds the lock.
    """
    if not is_lock_of(lock_fd, path):
        raise OSError(errno.EBADF, f"Descriptor {lock_fd} is not the lock of this journal", str(path))
    os.set_inheritable(lock_fd, False)
    _lock(lock_fd, path)


def is_lock_of(lock_fd: int, path: Path) -> bool:
    """Whether a descriptor refers to the current file, not to one that was removed. Raises FileNotFoundError."""
    return os.path.samestat(os.fstat(lock_fd), path.stat())


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now."""
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
    """Try a few times, because `is_locked` in another process may hold the lock briefly."""
    for _ in range(_LOCK_ATTEMPTS):
        if _try_lock(lock_fd, fcntl.LOCK_EX):
            return
        time.sleep(_PAUSE_SECONDS)
    raise JournalBusyError(f"Another process is writing {path.parent}; wait until it has ended.")


def _try_lock(lock_fd: int, kind: int) -> bool:
    try:
        fcntl.flock(lock_fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


RUNNER_MODULES = frozenset({b"sandbox.bootstrap.runner", b"sandbox.wiring.runner"})
"""Every runner has one of these arguments; other holders of the lock have neither. The second is from version 0.1."""


def kill_lock_holder(lock: Path) -> bool:
    """Send KILL to every other runner that holds the exclusive lock of this file. Return whether there was one."""
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
            # Check again: the pidfd now rules out a later process with the same id.
            if _holds_lock(pid, lock):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _holds_lock(pid: int, lock: os.stat_result) -> bool:
    proc_dir = Path("/proc", str(pid))
    try:
        if RUNNER_MODULES.isdisjoint((proc_dir / "cmdline").read_bytes().split(b"\0")):
            return False
        descriptors = os.listdir(proc_dir / "fdinfo")  # noqa: PTH208
    except OSError:
        return False
    return any(_descriptor_holds_lock(proc_dir, descriptor, lock) for descriptor in descriptors)


def _descriptor_holds_lock(proc_directory: Path, descriptor: str, lock: os.stat_result) -> bool:
    """Check the descriptor itself, not only its fdinfo.

    On overlayfs and btrfs, fdinfo shows the file system's device, which differs from that of each file. Only the fdinfo
    of the lock's own file is read: a sandbox process can have a runner's argument and files whose fdinfo is 100 MB
    each. A descriptor that is closed in the meantime does not count; the other ones are checked too.
    """
    try:
        if not os.path.samestat((proc_directory / "fd" / descriptor).stat(), lock):
            return False
        # proc(5): one line for each lock of the descriptor.
        lines = (proc_directory / "fdinfo" / descriptor).read_text().splitlines()
        return any(line.startswith("lock:") and " FLOCK " in line and " WRITE " in line for line in lines)
    except OSError:
        return False
