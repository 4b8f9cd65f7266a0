"""Disks that are ext4 file systems in sparse files of their own, so that a full one is full and nothing else is."""

import asyncio
import ctypes
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.layout import AttemptLayout
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import DISK_COMMAND_SECONDS, DISK_RELEASE_SECONDS, KILL_SECONDS

_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""A check of a killed process's that goes on would change a disk that the next process has mounted already."""

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CommandFailedError(Exception):
    """What the program said, on one line."""


async def run_command(*command: str, ok_codes: Collection[int] = (0,)) -> bytes:
    """Its output. Raises CommandFailedError, also past DISK_COMMAND_SECONDS or when it is not installed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_DIE_WITH_PARENT,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_ENVIRONMENT,
        )
    except OSError as error:
        raise CommandFailedError(f"{_DIE_WITH_PARENT[0]} does not start ({error.strerror})") from error
    try:
        async with asyncio.timeout(DISK_COMMAND_SECONDS):
            output, complaint = await process.communicate()
    except TimeoutError:
        raise CommandFailedError(f"{command[0]} takes too long") from None
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_SECONDS)
    if process.returncode not in ok_codes:
        said = " ".join(complaint.decode(errors="replace").split())[:500] or f"it ended with {process.returncode}"
        raise CommandFailedError(f"{command[0]}: {said}")
    return output


_DELETED = " (deleted)"


def find_devices(image: Path) -> Sequence[Path]:
    """Those in /sys/block that stand for this file, by whatever path it was opened."""
    path = str(image.parent.resolve() / image.name)
    return [device for device, file in list_devices() if file == path or _is_same(file, image)]


def list_devices() -> Iterator[tuple[Path, str]]:
    """Each device that is in use, and its file as the kernel names it."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield backing.parents[1], backing.read_text().rstrip("\n").removesuffix(_DELETED)


def _is_same(file: str, image: Path) -> bool:
    try:
        return Path(file).samefile(image)
    except OSError:
        return False


_MKFS_COMMAND = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard")
"""No journal: what a power loss leaves is only collected from, after a check that mends whatever can be mended."""
_OPTIONS = "loop,nosuid,nodev,noatime,discard,errors=remount-ro"
_FULL_BELOW_BYTES = 2 * 1024 * 1024  # a large write that does not fit leaves this much of a full disk
_POLL_SECONDS = 0.01
_REPAIRED = frozenset({0, 1})  # e2fsck(8): 1 is "errors corrected"


class LoopDisks:
    """Implements `contracts.disks.Disks`, as root, in a process with a mount namespace of its own (`hide_mounts`).

    Such a mount ends with the last process that sees it, whatever that process dies of.
    """

    enforces_size = True

    def __init__(self) -> None:
        self._disk_fd = -1
        """Open since the disk was mounted: the kernel tells it of every error from then on, once."""

        self._sync_error: OSError | None = None

    async def open(self, files: AttemptLayout, size_bytes: int) -> None:
        """Make the file system, or check the one that is there, and mount it."""
        files.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        if files.disk.is_mount():
            return
        try:
            if not files.disk_image.exists():
                await make_file_system(files.disk_image, size_bytes)
            else:
                await _wait_until_released(files.disk_image)
                await run_command("e2fsck", "-y", str(files.disk_image), ok_codes=_REPAIRED)
            await run_command("mount", "-t", "ext4", "-o", _OPTIONS, str(files.disk_image), str(files.disk))
            self._disk_fd = os.open(files.disk, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (CommandFailedError, OSError) as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The task's disk could not be made: {error}.") from error

    async def usage(self, files: AttemptLayout) -> DiskUsage:
        """What statvfs(3) says."""
        found = os.statvfs(files.disk)
        free_bytes = found.f_bavail * found.f_frsize
        total_bytes = found.f_blocks * found.f_frsize
        is_full = free_bytes < min(_FULL_BELOW_BYTES, total_bytes // 2) or found.f_favail == 0
        return DiskUsage(total_bytes - free_bytes, total_bytes, is_full)

    async def verify(self, files: AttemptLayout) -> None:
        """What an agent wrote is in memory first, and nobody inside hears that the file behind it took it not."""
        if self._disk_fd >= 0:
            await asyncio.to_thread(self._sync, self._disk_fd)
        if self._sync_error is not None:
            raise self._sync_error

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
            self._sync_error = OSError(number, os.strerror(number))


async def make_file_system(image: Path, size_bytes: int) -> None:
    """An empty one. It has its name only when it is whole. Raises CommandFailedError, OSError."""
    part = image.with_suffix(".part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        file.truncate(size_bytes)
    await run_command(*_MKFS_COMMAND, str(part))
    part.rename(image)


async def _wait_until_released(image: Path) -> None:
    """Wait until no loop device has it: mounted twice, a file system destroys itself. Raises OSError."""
    deadline = time.monotonic() + DISK_RELEASE_SECONDS
    while find_devices(image):
        if time.monotonic() > deadline:
            raise OSError("an earlier process of the task still has it")
        await asyncio.sleep(_POLL_SECONDS)


_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000


def unshare_mounts() -> None:
    """Enter a new one; what the host unmounts goes here too. As root, before any thread begins. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS))
    _check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_SIZE_BYTES = 1024 * 1024


async def loop_unavailable_reason(directory: Path) -> str | None:
    """None when a small file system can be made and mounted, else the reason; nothing stays in `directory`."""
    if os.geteuid() != 0:
        return "only root can mount"
    with tempfile.TemporaryDirectory(prefix="probe-", dir=directory) as place:
        image, point = Path(place) / "disk.img", Path(place) / "disk"
        point.mkdir()
        try:
            await make_file_system(image, _SIZE_BYTES)
            # In a mount namespace that ends with the command, so that there is nothing to unmount.
            await run_command("unshare", "--mount", "mount", "-t", "ext4", "-o", "loop", str(image), str(point))
        except (CommandFailedError, OSError) as error:
            return str(error)
    return None
