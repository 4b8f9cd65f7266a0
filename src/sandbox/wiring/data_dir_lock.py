"""The lock that makes its holder the one who works on a data directory: a server, or who mends it while none runs."""

import fcntl
import os
from pathlib import Path

from sandbox.model.errors import SandboxError


class DataDirBusyError(SandboxError):
    """Another server works on this data directory."""

    code = "data_dir_busy"


def lock(data_dir: Path) -> int:
    """One server a data directory; the lock goes with the process. Raises DataDirBusyError, OSError."""
    lock_fd = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock_fd, 32).decode(errors="replace").strip()
        os.close(lock_fd)
        raise DataDirBusyError(
            f"The server with process id {owner} works on {data_dir}; stop it or choose another --data-dir."
        ) from None
    os.ftruncate(lock_fd, 0)
    os.write(lock_fd, f"{os.getpid()}\n".encode())
    return lock_fd
