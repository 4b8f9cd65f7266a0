"""A disk that is an ext4 file system in a sparse file. A full disk therefore affects only its own attempt.

`MountHolderLeftovers` kills the processes that keep a disk mounted although its attempt no longer has a runner.
A disk is mounted in its runner's mount namespace, which exists as long as any process uses it. For example, a process
that the runner started outside the sandbox may have survived the runner.
"""

import asyncio
import ctypes
import fcntl
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.disks.commands import CommandFailedError, run_command
from sandbox.disks.directory_disk import create_home
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.task_file_layout import AttemptLayout, tasks_root
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import (
    DISK_FILES_MAX,
    DISK_RELEASE_TIMEOUT_SECONDS,
)

_DELETED = " (deleted)"


def find_devices(image: Path) -> Sequence[Path]:
    """Return the loop devices in /sys/block that use this file, regardless of the path by which it was opened."""
    path = str(image.parent.resolve() / image.name)
    return [device for device, file in list_devices() if file == path or _is_same(file, image)]


def list_devices() -> Iterator[tuple[Path, str]]:
    """Yield each loop device in use, with the path of its backing file as reported by the kernel."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield backing.parents[1], backing.read_text().rstrip("\n").removesuffix(_DELETED)


def _is_same(file: str, image: Path) -> bool:
    try:
        return Path(file).samefile(image)
    except OSError:
        return False


_MKFS_COMMAND = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard")
"""The file system has no journal.

After a power loss, fsck repairs as much as possible, and the disk is used only to collect files.
"""

_BYTES_PER_FILE = 16 * 1024
"""On a large disk, mkfs.ext4 creates one inode per this many bytes."""

_OPTIONS = "loop,nosuid,nodev,noatime,errors=remount-ro"
"""The options omit `discard`, which would punch a hole into the image for each extent of a truncated or removed file.

For a file with 150,000 extents, this takes longer than a killed process may take to end.
"""

_EXT4_SETTINGS = Path("/sys/fs/ext4")
_BLOCK_DEVICES = Path("/sys/dev/block")
_FILE_BLOCKS_MAX = 2**32 - 1
_UNUSED_BYTES_MAX = 1024 * 1024 * 1024
"""The space of removed files is returned to the host once the image exceeds the used space by more than this."""

_FITRIM = 0xC0185879  # FITRIM, see ioctl_fitrim(2)
_TRIM_STEP_BYTES = 1024 * 1024 * 1024
_TRIM_SECONDS = 0.5
_TRIMMED_EXTENT_BYTES_MIN = 1024 * 1024
"""Minimum length of a free extent that is returned to the host.

Each extent costs a call, and there can be millions of short ones.
"""

_EXT4_IOC_CLEAR_ES_CACHE = 0x6628  # EXT4_IOC_CLEAR_ES_CACHE

_FULL_BELOW_BYTES = 2 * 1024 * 1024  # when a large write fails on a full disk, this much space can remain free
_POLL_SECONDS = 0.01
_DISK_BLOCK_BYTES = 512
_REPAIRED = frozenset({0, 1})  # e2fsck(8): 1 is "errors corrected"


class LoopDisk:
    """Implements `interfaces.disks.Disk`. Needs root and a separate mount namespace (`unshare_mounts`).

    The mount is removed when the last process of the namespace exits, for any reason.
    """

    enforces_size = True

    def __init__(self, layout: AttemptLayout) -> None:
        self._layout = layout
        self._directory = layout.disk
        self._image = layout.disk_image
        self._disk_fd = -1
        """This descriptor stays open while the disk is mounted: the kernel reports each write error to it once."""

        self._disk_fd_lock = threading.Lock()
        self._sync_error: OSError | None = None
        self._can_trim = True
        self._trimmed_until = 0
        """The offset in the file system, in bytes, at which the next trim starts."""

    async def open(self, size_bytes: int) -> None:
        """Create the file system, or check an existing one, and mount it."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory.is_mount():
            return
        try:
            if not self._image.exists():
                await make_file_system(self._image, size_bytes)
            else:
                await _wait_until_released(self._image)
                await run_command("e2fsck", "-y", str(self._image), ok_codes=_REPAIRED)
            await run_command("mount", "-t", "ext4", "-o", _OPTIONS, str(self._image), str(self._directory))
            self._disk_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            share_preallocations(self._directory)
            create_home(self._layout)
        except (CommandFailedError, OSError) as error:
            raise AttemptError(
                FailureCode.PROVISION_FAILED, f"The task's disk could not be created: {error}."
            ) from error

    async def measure_and_trim(self) -> DiskUsage:
        """Return the usage that statvfs(3) reports.

        Also return some of the space freed by removed files to the host, and drop the image's extents from the kernel's
        cache.
        """
        found = os.statvfs(self._directory)
        free_bytes = found.f_bavail * found.f_frsize
        total_bytes = found.f_blocks * found.f_frsize
        is_full = free_bytes < min(_FULL_BELOW_BYTES, total_bytes // 2) or found.f_favail == 0
        usage = DiskUsage(total_bytes - free_bytes, total_bytes, is_full)
        await asyncio.to_thread(forget_cached_extents, self._image)
        await self._return_space(usage)
        return usage

    async def sync(self) -> None:
        """Flush the disk and raise the first write error.

        The kernel caches an agent's writes in memory. If the host cannot store them, no process in the sandbox gets an
        error.
        """
        if self._disk_fd >= 0:
            await asyncio.to_thread(self._sync, self._disk_fd)
        if self._sync_error is not None:
            raise self._sync_error

    async def close(self) -> None:
        """Unmount the disk once no process uses it any longer.

        After DISK_RELEASE_TIMEOUT_SECONDS, unmount it lazily: a process that still uses the disk then merely keeps
        the disk's blocks allocated.
        """
        with self._disk_fd_lock:
            if self._disk_fd >= 0:
                os.close(self._disk_fd)
                self._disk_fd = -1
        deadline = time.monotonic() + DISK_RELEASE_TIMEOUT_SECONDS
        while self._directory.is_mount():
            try:
                is_late = time.monotonic() > deadline
                await run_command("umount", *(("--lazy",) if is_late else ()), str(self._directory))
            except CommandFailedError as error:
                if is_late:
                    raise AttemptError(
                        FailureCode.SANDBOX_LOST, f"The task's disk is still in use: {error}."
                    ) from error
                await asyncio.sleep(_POLL_SECONDS)

    async def _return_space(self, usage: DiskUsage) -> None:
        """Punch holes into the unused parts of the image, if the image is much larger than the used space."""
        if not self._can_trim or self._disk_fd < 0:
            return
        image = self._image.stat()
        if image.st_blocks * _DISK_BLOCK_BYTES - usage.used_bytes > _UNUSED_BYTES_MAX:
            await asyncio.to_thread(self._trim, image.st_size)

    def _trim(self, size_bytes: int) -> None:
        """Trim for _TRIM_SECONDS; the next call continues. `close` waits for the current step."""
        with self._disk_fd_lock:
            if self._disk_fd < 0:
                return
            disk_fd = os.dup(self._disk_fd)
        deadline = time.monotonic() + _TRIM_SECONDS
        try:
            for _ in range(0, size_bytes, _TRIM_STEP_BYTES):
                if self._disk_fd < 0 or time.monotonic() > deadline:
                    return
                bounds = (self._trimmed_until, _TRIM_STEP_BYTES, _TRIMMED_EXTENT_BYTES_MIN)
                fcntl.ioctl(disk_fd, _FITRIM, struct.pack("=QQQ", *bounds))
                following = self._trimmed_until + _TRIM_STEP_BYTES
                self._trimmed_until = following if following < size_bytes else 0
        except OSError:
            self._can_trim = False  # the host's file system cannot punch holes
        finally:
            os.close(disk_fd)

    def _sync(self, disk_fd: int) -> None:
        """Call syncfs(2). Linux 5.8 and later report failed writes."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(disk_fd) != 0:
            number = ctypes.get_errno()
            self._sync_error = OSError(number, os.strerror(number))


def forget_cached_extents(image: Path) -> None:
    """Remove an image's extents from the kernel's cache. Does nothing unless the image is on ext4.

    If a program writes every other block of its disk, the kernel caches an extent and a hole of the image for each of
    these blocks. Each entry takes 40 bytes, which no control group is charged for. When the image is removed, the
    kernel removes its entries without interruption. For the ten million entries of a 40 GiB disk, this takes more than
    a second.
    """
    with suppress(OSError):
        image_fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(image_fd, _EXT4_IOC_CLEAR_ES_CACHE)
        finally:
            os.close(image_fd)


def share_preallocations(directory: Path) -> None:
    """Let all files of a mounted ext4 file system share its preallocated blocks. Does nothing if /sys is read-only.

    By default, the kernel preallocates blocks for each file that is larger than 64 KiB and open for writing. On a
    fragmented disk, one file then has a preallocation for each 8 KiB of the disk. Each preallocation takes 112
    bytes, which no control group is charged for. The kernel removes all of them without interruption when the file is
    closed.
    """
    device = directory.stat().st_dev
    name = (_BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}").resolve().name
    with suppress(OSError):
        (_EXT4_SETTINGS / name / "mb_stream_req").write_text(str(_FILE_BLOCKS_MAX))


def can_share_preallocations() -> bool:
    """Return whether root can change the settings of ext4 file systems; /sys may be read-only."""
    return os.access(_EXT4_SETTINGS, os.W_OK)


async def make_file_system(image: Path, size_bytes: int) -> None:
    """Create an empty file system. The file gets its final name when it is complete.

    Raises CommandFailedError, OSError.
    """
    part = image.with_suffix(".part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        file.truncate(size_bytes)
    limit = ("-N", str(DISK_FILES_MAX)) if size_bytes > DISK_FILES_MAX * _BYTES_PER_FILE else ()
    await run_command(*_MKFS_COMMAND, *limit, str(part))
    part.rename(image)


async def _wait_until_released(image: Path) -> None:
    """Wait until no loop device uses the image. Mounting it twice would destroy the file system. Raises OSError."""
    deadline = time.monotonic() + DISK_RELEASE_TIMEOUT_SECONDS
    while find_devices(image):
        if time.monotonic() > deadline:
            raise OSError("an earlier process of the task still uses the disk")
        await asyncio.sleep(_POLL_SECONDS)


_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000


def unshare_mounts() -> None:
    """Enter a new mount namespace, to which the host's unmounts still propagate.

    Call this as root before any thread is started. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS))
    _check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_PROBE_IMAGE_BYTES = 1024 * 1024


async def loop_unavailable_reason(directory: Path) -> str | None:
    """Return why a file system cannot be created and mounted, or None if it can. Leaves no files in `directory`."""
    if os.geteuid() != 0:
        return "only root can mount"
    with tempfile.TemporaryDirectory(prefix="probe-", dir=directory) as probe_dir:
        image, mount_point = Path(probe_dir) / "disk.img", Path(probe_dir) / "disk"
        mount_point.mkdir()
        try:
            await make_file_system(image, _PROBE_IMAGE_BYTES)
            # The mount namespace disappears when the command exits, so nothing needs to be unmounted.
            await run_command("unshare", "--mount", "mount", "-t", "ext4", "-o", "loop", str(image), str(mount_point))
        except (CommandFailedError, OSError) as error:
            return str(error)
    return None


class MountHolderLeftovers:
    """Implements `interfaces.placement.LeftoverSource` for the disks under one data directory."""

    kind = "disk"
    belongs_to_this_server = True

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts whose disk images are attached to loop devices."""
        images = [Path(file) for _, file in list_devices()]
        roots = [(image.parent, tasks_root(self._data_dir) / image.parts[-4]) for image in images if _is_disk(image)]
        return {root.name for root, task in roots if (task / "attempts" / root.name).exists()}

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Send SIGKILL to the processes in the disk's mount namespace until the kernel detaches the device.

        Raises OSError after DISK_RELEASE_TIMEOUT_SECONDS.
        """
        deadline = time.monotonic() + DISK_RELEASE_TIMEOUT_SECONDS
        while numbers := await asyncio.to_thread(_device_numbers, layout.disk_image):
            await asyncio.to_thread(_kill_holders, numbers, layout.disk)
            if time.monotonic() > deadline:
                raise OSError(
                    f"{layout.disk_image} is still in use; "
                    f"to find the process, run: grep -l {attempt_id} /proc/*/mounts"
                )
            await asyncio.sleep(_POLL_SECONDS)


def _device_numbers(image: Path) -> frozenset[str]:
    """Return `major:minor` of the image's loop devices, except those that an operator mounted on the host."""
    numbers = set()
    for device in find_devices(image):
        with suppress(OSError):
            numbers.add((device / "dev").read_text().strip())
    return frozenset(number for number in numbers if not _has_mount("self", number, ""))


def _kill_holders(numbers: Collection[str], disk: Path) -> None:
    """Kill the processes whose mount namespace has the disk mounted at the runner's mount point."""
    mount_point = str(Path("/", *disk.parts[-3:]))  # /attempts/<id>/disk, without the directories above it
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (a hot path)
    for pid in pids:
        for number in numbers:
            if _has_mount(str(pid), number, mount_point):
                _kill_if_mounted(pid, number, mount_point)


def _kill_if_mounted(pid: int, number: str, mount_point: str) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if _has_mount(str(pid), number, mount_point):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _has_mount(pid: str, number: str, mount_point: str) -> bool:
    """Return whether a process's namespace has the device mounted at a path with this suffix (proc(5))."""
    try:
        lines = Path("/proc", pid, "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    mounts = (line.split(" ", 5) for line in lines)
    return any(words[2] == number and words[4].endswith(mount_point) for words in mounts)


def _is_disk(image: Path) -> bool:
    return image.name == "disk.img" and len(image.parts) > 4 and image.parts[-3] == "attempts"
