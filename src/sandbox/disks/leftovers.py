"""Disks that are still mounted somewhere although nobody carries their attempts out any more.

A disk's mount is in the mount namespace of its runner, which lasts as long as any process in it: one that a runner had
started outside of the sandbox and that did not die with it.
"""

import asyncio
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout, tasks_root
from sandbox.model.limits import DISK_RELEASE_SECONDS

_POLL_SECONDS = 0.01


class DiskLeftovers:
    """Implements `contracts.leftovers.Leftovers` for the disks below one data directory."""

    kind = "disk"
    is_private = True

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def attempt_ids(self) -> Collection[str]:
        """Those whose file a loop device stands for."""
        root = tasks_root(self._data_dir.resolve())
        files = (_backing_file(device) for device in _loop_devices())
        ours = (Path(file).relative_to(root) for file in files if Path(file).is_relative_to(root))
        return {path.parts[2] for path in ours if len(path.parts) == 4 and path.parts[1] == "attempts"}

    async def end(self, attempt_id: str, files: AttemptLayout) -> None:
        """KILL whoever has the mount in sight, until the kernel has let go of it. Raises OSError after 10 s."""
        deadline = time.monotonic() + DISK_RELEASE_SECONDS
        while numbers := await asyncio.to_thread(_device_numbers, files.disk_image):
            await asyncio.to_thread(_kill_holders, numbers, files.disk)
            if time.monotonic() > deadline:
                raise OSError(f"{files.disk_image} is still in use; find by whom: grep -l {attempt_id} /proc/*/mounts")
            await asyncio.sleep(_POLL_SECONDS)


def _loop_devices() -> Iterator[Path]:
    yield from Path("/sys/block").glob("loop*/loop")


def _backing_file(device: Path) -> str:
    """As the kernel tells it; empty for a device that stands for nothing."""
    try:
        return (device / "backing_file").read_text().rstrip("\n").removesuffix(" (deleted)")
    except OSError:
        return ""


def _device_numbers(image: Path) -> frozenset[str]:
    """`major:minor` of the loop devices that stand for this file."""
    path, numbers = str(image.parent.resolve() / image.name), set()
    for device in _loop_devices():
        if _backing_file(device) == path:
            with suppress(OSError):
                numbers.add((device.parent / "dev").read_text().strip())
    return frozenset(numbers)


def _kill_holders(numbers: Collection[str], disk: Path) -> None:
    """Only whoever has it where the runner had mounted it, in a namespace of that runner's.

    An operator may have mounted the file elsewhere, for everybody: that is not ours to end. Raises OSError for a mount
    that this process sees itself.
    """
    point = str(disk.resolve())
    if _has_mount("self", numbers, None):
        raise OSError(f"{disk.parent.name}'s disk is mounted for everybody; unmount it (grep disk.img /proc/mounts)")
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  (a hot path)
        if _has_mount(pid, numbers, point):
            _kill(int(pid), numbers, point)


def _kill(pid: int, numbers: Collection[str], point: str) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if _has_mount(str(pid), numbers, point):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _has_mount(pid: str, numbers: Collection[str], point: str | None) -> bool:
    """Whether a process has one of these devices in sight, at `point` or (None) anywhere."""
    try:
        lines = Path("/proc", pid, "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    mounts = (line.split(" ", 5) for line in lines)
    return any(words[2] in numbers and point in (None, _unescaped(words[4])) for words in mounts)


def _unescaped(path: str) -> str:
    """proc(5), mountinfo: spaces and the like are octal."""
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
