"""What the open files of a sandbox make the kernel hold, counted from outside in /proc.

Locks, half-read directories and the like are charged to no control group. Only descriptors tell which sandbox they
belong to: /proc/locks names the process that took a lock, which may have ended, and its id may be another's by now.
"""

import os
import random
import re
import stat
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path

from sandbox.contracts.runtime import FileUse
from sandbox.model.limits import OPEN_DIRECTORIES_MAX, OPEN_FILES_OF_SANDBOX_MAX

_LOCKS = Path("/proc/locks")
_LOCKS_OF_MACHINE = 1024
"""While the whole machine has fewer, those of a sandbox are not counted. The kernel takes long to list many."""

_SAMPLE = 4096
"""Of more open files so many are looked at, chosen at random anew each time."""

_FLAGS = re.compile(r"^flags:\s*(\d+)$", re.MULTILINE)
_POSIX_LOCK = re.compile(r"^lock:.* POSIX ", re.MULTILINE)


def count_files(process_ids: Collection[int]) -> FileUse:
    """Of the processes of one sandbox. Where there are many, directories are estimated, and there may be more locks.

    Locks are no estimate, because one file can have all of them.
    """
    tables = {table: count for pid in process_ids if (table := find_table(pid)) and (count := count_table(table))}
    total = sum(tables.values())
    are_locks_counted, are_directories_counted = has_many_locks(), total > OPEN_DIRECTORIES_MAX
    if total > OPEN_FILES_OF_SANDBOX_MAX or not (are_locks_counted or are_directories_counted):
        return FileUse(total)
    files = [f"{table}/{{}}/{name}" for table in tables for name in list_names(f"{table}/fd")]
    sample = random.sample(files, min(len(files), _SAMPLE))
    directories = sum(map(is_directory, sample)) if are_directories_counted else 0
    locks = sum(map(count_locks, sample)) if are_locks_counted else 0
    return FileUse(total, directories=round(directories * len(files) / max(1, len(sample))), locks=locks)


def count_directories(process_ids: Collection[int], *, descriptors_each: int) -> FileUse:
    """Open directories of a sandbox whose own kernel is a program of the host: only one of its processes has them.

    Other processes may share that one's table of files, so it is not a sum. descriptors_each: what the program opens
    for a directory. Paths (O_PATH) hold nothing.
    """
    tables = {table: count_table(table) for pid in process_ids if (table := find_table(pid))}
    table = max(tables, key=lambda one: tables[one], default="")
    if tables.get(table, 0) <= OPEN_DIRECTORIES_MAX:
        return FileUse()
    files = [f"{table}/{{}}/{name}" for name in list_names(f"{table}/fd")]
    sample = random.sample(files, min(len(files), _SAMPLE))
    found = sum(is_directory(file) and not is_path(file) for file in sample)
    return FileUse(directories=round(found * len(files) / max(1, len(sample)) / descriptors_each))


def has_many_locks() -> bool:
    """Whether the machine has so many locks on files that a sandbox may have too many of them."""
    try:
        with _LOCKS.open() as file:
            return sum(1 for _ in islice(file, _LOCKS_OF_MACHINE)) == _LOCKS_OF_MACHINE
    except OSError:
        return False


def find_table(pid: int) -> str | None:
    """The directory that stands for a process's open files; its first thread may have ended before the others."""
    own = f"/proc/{pid}"
    if count_table(own):
        return own
    threads = (f"{own}/task/{thread}" for thread in list_names(f"{own}/task"))
    return next((thread for thread in threads if count_table(thread)), None)


def count_table(table: str) -> int:
    """How many files are open; 0 where that cannot be seen. Before Linux 6.2 the size of the directory is 0."""
    with suppress(OSError):
        return Path(f"{table}/fd").stat().st_size or len(list_names(f"{table}/fd"))
    return 0


def list_names(directory: str) -> list[str]:
    """In a directory of /proc; none where it is gone or hidden."""
    with suppress(OSError), os.scandir(directory) as entries:
        return [entry.name for entry in entries]
    return []


def is_directory(file: str) -> bool:
    """file: its path, with braces in the place of `fd` or `fdinfo`."""
    with suppress(OSError):
        return stat.S_ISDIR(Path(file.format("fd")).stat().st_mode)
    return False


def is_path(file: str) -> bool:
    """Whether it was opened with O_PATH; a file that is gone was."""
    with suppress(OSError):
        flags = _FLAGS.search(Path(file.format("fdinfo")).read_text())
        return flags is not None and bool(int(flags[1], 8) & os.O_PATH)
    return True


def count_locks(file: str) -> int:
    """POSIX locks that were taken by this open file. The other kinds are one for each open file."""
    with suppress(OSError):
        return len(_POSIX_LOCK.findall(Path(file.format("fdinfo")).read_text()))
    return 0
