"""Files that have lost their names: they take room as long as a process has them open, and du(1) sees none of them."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from sandbox.model.limits import DISK_COMMAND_SECONDS

_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILES = 2
_libc = ctypes.CDLL(None)


class Unnamed(msgspec.Struct, frozen=True):
    """How much there is."""

    size_bytes: int
    file_count: int


def measure_unnamed(device: int) -> Unnamed:
    """Those on the device (st_dev) that descendants of this process have open, whatever path leads them there.

    A process that has closed its /proc to its user is passed over, and so is what is mapped or under way in a
    socket only. Raises OSError past DISK_COMMAND_SECONDS.
    """
    deadline = time.monotonic() + DISK_COMMAND_SECONDS
    sizes: dict[int, int] = {}
    for found in _open_files():
        if found.st_dev == device and found.st_nlink == 0:
            sizes[found.st_ino] = found.st_blocks * 512
        if time.monotonic() > deadline:
            raise OSError("its sandbox has too many files open")
    return Unnamed(sum(sizes.values()), len(sizes))


def _open_files() -> Iterator[os.stat_result]:
    for pid in _descendants(os.getpid()):
        if _shares_files(pid, _parent(pid)):
            continue  # as all the processes in which gVisor has programs run
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):  # closed since
                    yield entry.stat()


def _shares_files(pid: int, other: int) -> bool:
    """Whether two processes have one table of open files (kcmp(2)); no where that cannot be told."""
    number = _KCMP.get(os.uname().machine)
    return number is not None and _libc.syscall(number, pid, other, _KCMP_FILES, 0, 0) == 0


def _descendants(ancestor: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    children: dict[int, list[int]] = {}
    for pid in pids:
        if pid == ancestor:  # so that ids that are used anew meanwhile make no circle
            continue
        children.setdefault(_parent(pid), []).append(pid)
    found = [*children.get(ancestor, ())]
    for pid in found:
        found += children.get(pid, ())
    return found


def _parent(pid: int) -> int:
    """Its parent's id, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  (a hot path)
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0
