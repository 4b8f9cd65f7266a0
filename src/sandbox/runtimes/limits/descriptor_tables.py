"""Lists a process's open descriptors, and reads what each of them refers to, from the host's /proc."""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE

_FDINFO_BYTES_MAX = 1 << 20
"""Maximum number of bytes to read about one open file. Its locks come first, and more than FILE_LOCKS_MAX fit."""

_TABLE_SIZE = re.compile(r"^FDSize:\s*(\d+)$", re.MULTILINE)
_FLAGS = re.compile(r"^flags:\s*(\d+)$", re.MULTILINE)
_LOCK_KIND = re.compile(r"^lock:\s+\d+: (\w+)", re.MULTILINE)

_SANDBOX_PATH_PREFIXES = (
    *(SANDBOX_WORKSPACE, SANDBOX_HOME, "/tmp", "/dev/shm", "/dev/pts", "/proc"),  # noqa: S108
    *("/memfd:", "/SYSV", "pipe:", "socket:"),
)
"""Path prefixes of files that have a separate inode in each sandbox."""

_SYSCTL_DIRECTORY = "/proc/sys/"
"""Prefix of the settings that are bind-mounted from the host's /proc if the server runs as an ordinary user."""


def find_fd_table(pid: int) -> str | None:
    """Return the /proc directory with a process's open files. Its first thread may have ended before the others."""
    found = find_counted_fd_table(pid)
    return None if found is None else found[0]


def find_counted_fd_table(pid: int) -> tuple[str, int] | None:
    """Return the /proc directory with a process's open files, and their number; None if none is visible."""
    process_directory = f"/proc/{pid}"
    if count := count_open_files(process_directory):
        return process_directory, count
    threads = (f"{process_directory}/task/{thread}" for thread in list_directory(f"{process_directory}/task"))
    return next(((thread, count) for thread in threads if (count := count_open_files(thread))), None)


def count_open_files(table: str) -> int:
    """Return the number of open files; 0 if they are not visible. Before Linux 6.2, the size of the directory is 0."""
    with suppress(OSError):
        return os.stat(f"{table}/fd").st_size or len(list_directory(f"{table}/fd"))  # noqa: PTH116  (Path is slow)
    return 0


def descriptor_table_size(table: str) -> int:
    """Return the number of entries in a descriptor table, including unused ones; 0 if the table is gone."""
    with suppress(OSError):
        # The name of a program may contain any bytes.
        found = _TABLE_SIZE.search(Path(f"{table}/status").read_text(errors="replace"))
        return int(found[1]) if found is not None else 0
    return 0


def list_directory(directory: str) -> list[str]:
    """Return the names in a directory under /proc; empty if the directory is gone or hidden."""
    with suppress(OSError), os.scandir(directory) as entries:
        return [entry.name for entry in entries]
    return []


def is_directory(file: str) -> bool:
    """Return whether the file is a directory. file: path with braces in place of `fd` or `fdinfo`."""
    with suppress(OSError):
        return stat.S_ISDIR(Path(file.format("fd")).stat().st_mode)
    return False


def is_o_path_descriptor(file: str) -> bool:
    """Return whether the file was opened with O_PATH; True if the file is gone."""
    with suppress(OSError):
        flags = _FLAGS.search(Path(file.format("fdinfo")).read_text())
        return flags is not None and bool(int(flags[1], 8) & os.O_PATH)
    return True


def list_locks(file: str) -> list[str]:
    """Return the kind of each lock taken through this open file; empty if the file was closed.

    There can be many POSIX locks, but at most one lock of each other kind.
    """
    with suppress(OSError), Path(file.format("fdinfo")).open() as info:
        return _LOCK_KIND.findall(info.read(_FDINFO_BYTES_MAX))
    return []


def is_shared_with_host(file: str) -> bool:
    """Return whether the host uses this file too: a device, a file of /usr or of an image, an eventfd or similar."""
    with suppress(OSError):
        path = str(Path(file.format("fd")).readlink())
        return path.startswith(_SYSCTL_DIRECTORY) or not path.startswith(_SANDBOX_PATH_PREFIXES)
    return False
