"""The lock that makes its holder the one who works on a data directory: a server, or who mends it while none runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sandbox.model.errors import SandboxError


class DataDirBusyError(SandboxError):
    """Another server works on this data directory."""

    code = "data_dir_busy"


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Work on a data directory as nobody else does meanwhile; the lock goes with the process.

    The directory itself is locked, whatever path leads to it: no cleaner can take it away, as it can a file. The file
    `server.lock` says who it is. Raises DataDirBusyError, OSError.
    """
    with ExitStack() as opened:
        directory = _open(opened, data_dir, os.O_RDONLY | os.O_DIRECTORY)
        file = _open(opened, data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        for descriptor in (directory, file):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataDirBusyError(_describe(data_dir, os.read(file, 32))) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield


def _open(opened: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, descriptor)
    return descriptor


def _describe(data_dir: Path, owner: bytes) -> str:
    who = owner.decode(errors="replace").strip()
    process = f"The server with process id {who}" if who.isdigit() else "Another server"
    return f"{process} works on {data_dir}; stop it or choose another --data-dir."
