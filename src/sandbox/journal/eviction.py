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
    # proc(5), fdinfo: device and inode of a lock that comes with the descriptor.
    mark = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino} "
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    killed = [pid for pid in pids if pid != os.getpid() and _kill(pid, mark)]
    return bool(killed)


def _kill(pid: int, mark: str) -> bool:
    if not _holds(pid, mark):
        return False
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at again, now that no later process of the same id can be meant.
            if _holds(pid, mark):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def _holds(pid: int, mark: str) -> bool:
    place = Path("/proc", str(pid))
    try:
        if RUNNER not in (place / "cmdline").read_bytes().split(b"\0"):
            return False
        told = [_read(path) for path in (place / "fdinfo").iterdir()]
    except OSError:
        return False
    locks = [line for text in told for line in text.splitlines() if line.startswith("lock:")]
    return any(" FLOCK " in line and " WRITE " in line and f" {mark}" in line for line in locks)


def _read(path: Path) -> str:
    """Nothing of a descriptor that is closed meanwhile: the others tell."""
    try:
        return path.read_text()
    except OSError:
        return ""
