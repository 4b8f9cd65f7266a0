"""Disks that are ext4 file systems in sparse files of their own, so that a full one is full and nothing else is."""

import asyncio
import ctypes
import os
import time
from pathlib import Path

from sandbox.contracts.disks import DiskUse
from sandbox.contracts.layout import AttemptLayout
from sandbox.disks.command import CommandFailedError, run_command
from sandbox.disks.devices import find_devices
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import DISK_RELEASE_SECONDS

_MAKE = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard")
"""No journal: what a power loss leaves is only collected from, after a check that mends whatever can be mended."""
_OPTIONS = "loop,nosuid,nodev,noatime,discard,errors=remount-ro"
_FULL_BELOW_BYTES = 2 * 1024 * 1024  # a large write that does not fit leaves this much of a full disk
_POLL_SECONDS = 0.01
_REPAIRED = frozenset({0, 1})  # e2fsck(8): 1 is "errors corrected"


class LoopDisks:
    """Implements `contracts.disks.Disks`, as root, in a process with a mount namespace of its own (`hide_mounts`).

    Such a mount ends with the last process that sees it, whatever that process dies of.
    """

    tells_when_full = True

    def __init__(self) -> None:
        self._disk_fd = -1
        """Open since the disk was mounted: the kernel tells it of every error from then on, once."""

        self._loss: OSError | None = None

    async def open(self, files: AttemptLayout, size_bytes: int) -> None:
        """Make the file system, or check the one that is there, and mount it."""
        files.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        if files.disk.is_mount():
            return
        try:
            if not files.disk_image.exists():
                await make_file_system(files.disk_image, size_bytes)
            else:
                await _released(files.disk_image)
                await run_command("e2fsck", "-y", str(files.disk_image), good_codes=_REPAIRED)
            await run_command("mount", "-t", "ext4", "-o", _OPTIONS, str(files.disk_image), str(files.disk))
            self._disk_fd = os.open(files.disk, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (CommandFailedError, OSError) as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The task's disk could not be made: {error}.") from error

    async def use(self, files: AttemptLayout) -> DiskUse:
        """What statvfs(3) says."""
        found = os.statvfs(files.disk)
        free_bytes = found.f_bavail * found.f_frsize
        total_bytes = found.f_blocks * found.f_frsize
        is_full = free_bytes < min(_FULL_BELOW_BYTES, total_bytes // 2) or found.f_favail == 0
        return DiskUse(total_bytes - free_bytes, total_bytes, is_full)

    async def verify(self, files: AttemptLayout) -> None:
        """What an agent wrote is in memory first, and nobody inside hears that the file behind it took it not."""
        if self._disk_fd >= 0:
            await asyncio.to_thread(self._sync, self._disk_fd)
        if self._loss is not None:
            raise self._loss

    async def close(self, files: AttemptLayout) -> None:
        """Unmount it; whoever still holds a file of it is waited for, and in the end keeps but the blocks of it."""
        if self._disk_fd >= 0:
            os.close(self._disk_fd)
            self._disk_fd = -1
        deadline = time.monotonic() + DISK_RELEASE_SECONDS
        while files.disk.is_mount():
            try:
                is_late = time.monotonic() > deadline
                await run_command("umount", *(("--lazy",) if is_late else ()), str(files.disk))
            except CommandFailedError as error:
                if is_late:
                    raise AttemptError(
                        FailureCode.SANDBOX_LOST, f"The task's disk is still in use: {error}."
                    ) from error
                await asyncio.sleep(_POLL_SECONDS)

    def _sync(self, disk_fd: int) -> None:
        """syncfs(2), which since Linux 5.8 tells of what could not be stored."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(disk_fd) != 0:
            number = ctypes.get_errno()
            self._loss = OSError(number, os.strerror(number))


async def make_file_system(image: Path, size_bytes: int) -> None:
    """An empty one. It has its name only when it is whole. Raises CommandFailedError, OSError."""
    part = image.with_suffix(".part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        file.truncate(size_bytes)
    await run_command(*_MAKE, str(part))
    part.rename(image)


async def _released(image: Path) -> None:
    """Wait until no loop device has it: mounted twice, a file system destroys itself. Raises OSError."""
    deadline = time.monotonic() + DISK_RELEASE_SECONDS
    while find_devices(image):
        if time.monotonic() > deadline:
            raise OSError("an earlier process of the task still has it")
        await asyncio.sleep(_POLL_SECONDS)
