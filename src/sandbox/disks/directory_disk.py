"""A disk that is a plain directory, for machines that cannot mount file systems, and home directories on any disk.

The usage of such a disk must be polled.
"""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.disks.commands import NAMESPACE_ROOT_COMMAND, CommandFailedError, run_command
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.model.fixed_limits import DISK_COMMAND_TIMEOUT_SECONDS
from sandbox.primitives.concurrency import run_in_daemon_thread

_NEW_LAYOUT_MARKER = "proc"
"""A directory on new disks, used as a mount point. Disks of earlier versions lack it; their home directory is `home`.

Agents cannot create this directory, because they have no access to the root of a disk.
"""


def create_home(layout: AttemptLayout) -> None:
    """Create the home directory of an open disk. Idempotent, even after an interruption. Raises OSError."""
    marker, parent, new_parent = layout.disk / _NEW_LAYOUT_MARKER, layout.home.parent, layout.disk / "home.new"
    if not marker.exists() and parent.exists():
        with suppress(OSError):
            (layout.disk / "lost+found").rmdir()  # frees blocks and an inode on a full disk
        new_parent.mkdir(exist_ok=True)
        parent.chmod(0o700)  # the owner of a directory needs write permission to move it
        parent.rename(new_parent / layout.home.name)
    marker.mkdir(exist_ok=True)
    # If the parent exists, `home.new` is the mount point of an entry of the image, so it must not be moved.
    if not parent.exists():
        with suppress(FileNotFoundError):
            new_parent.rename(parent)
    parent.mkdir(exist_ok=True)
    parent.chmod(0o755)
    layout.home.mkdir(mode=0o700, exist_ok=True)


_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILES = 2
_libc = ctypes.CDLL(None)


class DeletedFiles(msgspec.Struct, frozen=True):
    """The number and total size of deleted files that are still open."""

    size_bytes: int
    file_count: int


def measure_deleted_files(device: int) -> DeletedFiles:
    """Measure the deleted files on the device (st_dev) that descendants of this process still have open.

    Skips processes whose /proc entries even their own user cannot read, files that are only mapped, and files in
    transit over a socket. Raises OSError if the measurement takes longer than DISK_COMMAND_TIMEOUT_SECONDS.
    """
    deadline = time.monotonic() + DISK_COMMAND_TIMEOUT_SECONDS
    sizes: dict[int, int] = {}
    for found in _open_files():
        if found.st_dev == device and found.st_nlink == 0:
            sizes[found.st_ino] = found.st_blocks * 512
        if time.monotonic() > deadline:
            raise OSError("the sandbox has too many open files")
    return DeletedFiles(sum(sizes.values()), len(sizes))


def _open_files() -> Iterator[os.stat_result]:
    for pid in _descendants(os.getpid()):
        if _shares_files(pid, _parent_pid(pid)):
            continue  # for example, the processes in which gVisor runs programs share one table
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):  # closed in the meantime
                    yield entry.stat()


def _shares_files(pid: int, other: int) -> bool:
    """Return whether two processes share one table of open files (kcmp(2)); False if unknown."""
    number = _KCMP.get(os.uname().machine)
    return number is not None and _libc.syscall(number, pid, other, _KCMP_FILES, 0, 0) == 0


def _descendants(ancestor: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    children: dict[int, list[int]] = {}
    for pid in pids:
        if pid == ancestor:  # otherwise, pids that are reused during this scan could form a cycle
            continue
        children.setdefault(_parent_pid(pid), []).append(pid)
    found = [*children.get(ancestor, ())]
    for pid in found:
        found += children.get(pid, ())
    return found


def _parent_pid(pid: int) -> int:
    """Return the pid of the parent; 0 if the process has exited."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  (a hot path)
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


_BYTES_PER_FILE = 4096
"""Number of bytes of disk size per allowed file. This limits empty files, which use an inode but no block."""

_MEASURE_FAILED = "The disk usage cannot be measured"

_MEASURE_BYTES_MAX = 512 * 1024 * 1024
"""Maximum memory of du(1), which no control group limits. It needs almost 1 KiB for each level of directories."""


class DirectoryDisk:
    """Implements `interfaces.disks.Disk`."""

    enforces_size = False

    def __init__(self, layout: AttemptLayout) -> None:
        self._layout = layout
        self._directory = layout.disk
        self._size_bytes = 0

    async def open(self, size_bytes: int) -> None:
        """Create the directory."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_home(self._layout)
        self._size_bytes = size_bytes

    async def measure_and_trim(self) -> DiskUsage:
        """Measure with du(1), which handles any depth of directories, and add deleted files that are still open.

        A file that is deleted during the measurement may be missed, but is never counted twice.
        """
        deleted_usage = await _measure_deleted(self._directory)
        used_bytes = deleted_usage.size_bytes + await _run_du(self._directory, "--block-size=1")
        file_count = deleted_usage.file_count + await _run_du(self._directory, "--inodes")
        is_full = used_bytes >= self._size_bytes or file_count >= self._size_bytes // _BYTES_PER_FILE
        return DiskUsage(used_bytes, self._size_bytes, is_full)

    async def sync(self) -> None:
        """Do nothing, because the host's file system reports errors directly to the processes that write."""

    async def close(self) -> None:
        """Do nothing, because there is nothing to release."""


async def _measure_deleted(directory: Path) -> DeletedFiles:
    try:
        return await run_in_daemon_thread(lambda: measure_deleted_files(directory.stat().st_dev))
    except OSError as error:
        raise OSError(f"{_MEASURE_FAILED}: {error}") from error


async def _run_du(directory: Path, unit: str) -> int:
    limits = (f"--data={_MEASURE_BYTES_MAX}", "--core=1")
    command = ("prlimit", *limits, "du", "-s", "-x", unit, "--", str(directory))
    output = b""
    try:
        if os.geteuid() != 0:
            # As an ordinary user, du could not read directories that an agent made unreadable to hide files.
            output = await run_command(*NAMESPACE_ROOT_COMMAND, *command, ok_codes=(0, 1))
        output = output or await run_command(*command, ok_codes=(0, 1))
        return int(output.split()[0])
    except (CommandFailedError, ValueError, IndexError) as error:
        raise OSError(f"{_MEASURE_FAILED}: {error}") from error
