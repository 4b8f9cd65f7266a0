"""Counts a sandbox's open directories and file locks, by reading the host's /proc.

Locks, partly read directories and similar objects are not charged to any control group. Only descriptors show which
sandbox an object belongs to: /proc/locks names the process that took a lock, but that process may have ended and its id
may have been reused.
"""

import os
import random
import re
import stat
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.fixed_limits import OPEN_DIRECTORIES_MAX, OPEN_FILES_OF_SANDBOX_MAX
from sandbox.runtimes.limits.kernel_watch import FileUsage

_PROC_LOCKS = Path("/proc/locks")
_FILE_LOCKS_OF_MACHINE_MIN = 1024
"""While the machine has fewer locks, a sandbox's locks are not counted, because counting takes a long time."""

_SAMPLE_SIZE_MAX = 4096
"""Maximum number of open files to inspect; a larger set is randomly sampled each time."""

_LISTED_FILES_MAX = 65_536
"""Maximum size of a descriptor table that is listed.

Listing a million descriptors takes 1 to 2 s of CPU time, and the kernel keeps an inode of /proc for each of them.
"""
_TRIED_DESCRIPTORS_MAX = 4 * _SAMPLE_SIZE_MAX
"""Maximum number of random descriptors that are inspected in a larger table, whether they are open or not."""

_LOCK_COUNT_SECONDS = 2.0
"""Maximum CPU time of one count of locks. A count usually takes 0.2 s.

For an epoll or inotify instance, the kernel also lists all files that the instance watches, which takes 0.5 s for a
million entries.
"""
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


def count_files(process_ids: Collection[int], *, counts_locks: bool = True) -> FileUsage:
    """Count the open files of one sandbox's processes.

    counts_locks: pass False to avoid waiting for a program inside. To list the locks of an epoll or inotify instance,
        the kernel needs the instance's lock, which a program can hold for a long time.

    With many files, the number of directories is an estimate. The number of locks is a lower bound and never
    extrapolated, because one file can have all of them.
    """
    tables = dict(filter(None, map(_find_counted_fd_table, process_ids)))
    total = sum(tables.values())
    are_locks_counted, are_directories_counted = counts_locks and has_many_locks(), total > OPEN_DIRECTORIES_MAX
    if total > OPEN_FILES_OF_SANDBOX_MAX or not (are_locks_counted or are_directories_counted):
        return FileUsage(total)
    files = [f"{table}/{{}}/{name}" for table in tables for name in list_directory(f"{table}/fd")]
    sample = random.sample(files, min(len(files), _SAMPLE_SIZE_MAX))
    directories = sum(map(is_directory, sample)) if are_directories_counted else 0
    locks = sum_locks(sample) if are_locks_counted else FileLockCounts()
    scale = len(files) / max(1, len(sample))
    return FileUsage(
        total,
        directories=round(directories * scale),
        locks=locks.posix,
        locks_on_host_files=round(locks.on_host_files * scale),
        was_cut_short=locks.was_cut_short,
    )


class FileLockCounts(msgspec.Struct):
    """Counts of the locks taken through a set of open files.

    posix: number of POSIX locks.
    on_host_files: number of locks of any kind on files that the host also uses.
    was_cut_short: whether counting stopped early because it took too long.
    """

    posix: int = 0
    on_host_files: int = 0
    was_cut_short: bool = False


def sum_locks(files: Collection[str]) -> FileLockCounts:
    """Return the locks that were taken through these open files."""
    deadline, found = time.thread_time() + _LOCK_COUNT_SECONDS, FileLockCounts()
    for file in files:
        if time.thread_time() > deadline:
            found.was_cut_short = True
            break
        kinds = list_locks(file)
        found.posix += kinds.count("POSIX")
        if kinds and is_shared_with_host(file):
            found.on_host_files += len(kinds)
    return found


def count_directories(process_ids: Collection[int], *, descriptors_per_directory: int) -> FileUsage:
    """Count the open directories of a sandbox whose kernel is a host program, which opens all of them in one process.

    Other processes may share that process's descriptor table, so the numbers are not added up. Descriptors opened with
    O_PATH do not count. descriptors_per_directory: number of descriptors that the program opens for a directory.
    """
    tables = {table: count_open_files(table) for pid in process_ids if (table := find_fd_table(pid))}
    table = max(tables, key=lambda one: tables[one], default="")
    count = tables.get(table, 0)
    if count <= OPEN_DIRECTORIES_MAX:
        return FileUsage()
    if count <= _LISTED_FILES_MAX:
        descriptors: Sequence[str | int] = list_directory(f"{table}/fd")
        sample_size = min(len(descriptors), _SAMPLE_SIZE_MAX)
    else:
        descriptors = range(descriptor_table_size(table))
        sample_size = min(len(descriptors), _TRIED_DESCRIPTORS_MAX)
    sample = [f"{table}/{{}}/{descriptor}" for descriptor in random.sample(descriptors, sample_size)]
    found = sum(is_directory(file) and not is_o_path_descriptor(file) for file in sample)
    return FileUsage(directories=round(found * len(descriptors) / max(1, sample_size) / descriptors_per_directory))


def has_many_locks() -> bool:
    """Return whether the machine has so many file locks that a sandbox may exceed its limit."""
    try:
        with _PROC_LOCKS.open() as file:
            return sum(1 for _ in islice(file, _FILE_LOCKS_OF_MACHINE_MIN)) == _FILE_LOCKS_OF_MACHINE_MIN
    except OSError:
        return False


def find_fd_table(pid: int) -> str | None:
    """Return the /proc directory with a process's open files. Its first thread may have ended before the others."""
    found = _find_counted_fd_table(pid)
    return None if found is None else found[0]


def _find_counted_fd_table(pid: int) -> tuple[str, int] | None:
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
