"""Ends the runner that holds a journal's lock, whatever it is stuck in. A stopped process holds its locks for ever."""

import os
import signal
from contextlib import suppress
from pathlib import Path

RUNNER = b"sandbox.wiring.runner"
"""An argument of every runner, and of nobody else who may hold the lock."""


def evict(lock: Path) -> bool:
    """KILL every other process that is a runner and holds the exclusive lock of this file; whether there was one."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    killed = [pid for pid in pids if pid != os.getpid() and _kill(pid, found)]
    return bool(killed)


def _kill(pid: int, lock: os.stat_result) -> bool:
    if not _holds(pid, lock):
        return False
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at again, now that no later process of the same id can be meant.
            if _holds(pid, lock):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _holds(pid: int, lock: os.stat_result) -> bool:
    place = Path("/proc", str(pid))
    try:
        if RUNNER not in (place / "cmdline").read_bytes().split(b"\0"):
            return False
        descriptors = os.listdir(place / "fdinfo")  # noqa: PTH208
    except OSError:
        return False
    return any(_is_locked(place, descriptor, lock) for descriptor in descriptors)


def _is_locked(place: Path, descriptor: str, lock: os.stat_result) -> bool:
    """By the descriptor itself: fdinfo's device is the file system's, which overlayfs and btrfs give no file.

    One that is closed meanwhile is not: the others tell.
    """
    try:
        # proc(5): a line for each lock that comes with the descriptor.
        lines = (place / "fdinfo" / descriptor).read_text().splitlines()
        is_exclusive = any(line.startswith("lock:") and " FLOCK " in line and " WRITE " in line for line in lines)
        return is_exclusive and os.path.samestat((place / "fd" / descriptor).stat(), lock)
    except OSError:
        return False
