"""Kills the processes that keep a disk mounted although its attempt no longer has a runner.

A disk is mounted in its runner's mount namespace, which exists as long as any process uses it. For example, a process
that the runner started outside the sandbox may have survived the runner.
"""

import asyncio
import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from sandbox.disks.loop_disk import find_devices, list_devices
from sandbox.interfaces.file_layout import AttemptLayout, tasks_root
from sandbox.model.fixed_limits import DISK_RELEASE_TIMEOUT_SECONDS

_POLL_SECONDS = 0.01


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
