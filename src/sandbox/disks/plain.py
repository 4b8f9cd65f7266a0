"""Disks that are plain directories, where nothing can be mounted: somebody has to look how full they are."""

import os
from pathlib import Path

from sandbox.contracts.disks import DiskUse
from sandbox.contracts.layout import AttemptLayout
from sandbox.contracts.waiting_thread import wait_in_thread
from sandbox.disks.command import CommandFailedError, run_command
from sandbox.disks.removal import AS_OWNER_OF_ALL
from sandbox.disks.unnamed import Unnamed, measure_unnamed

_BYTES_PER_FILE = 4096
"""An empty file takes no block, but takes one of the file system's names from everybody else."""

_UNMEASURED = "It cannot be told how full the disk is"


class PlainDisks:
    """Implements `contracts.disks.Disks`."""

    tells_when_full = False

    def __init__(self) -> None:
        self._size_bytes = 0

    async def open(self, files: AttemptLayout, size_bytes: int) -> None:
        """Make the directory."""
        files.disk.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._size_bytes = size_bytes

    async def use(self, files: AttemptLayout) -> DiskUse:
        """What du(1) counts, which no depth of directories exhausts, and what is open without a name.

        What goes away meanwhile counts nothing, and what loses its name meanwhile not twice.
        """
        unnamed = await _measure_unnamed(files.disk)
        used_bytes = unnamed.size_bytes + await _count(files.disk, "--block-size=1")
        file_count = unnamed.file_count + await _count(files.disk, "--inodes")
        is_full = used_bytes >= self._size_bytes or file_count >= self._size_bytes // _BYTES_PER_FILE
        return DiskUse(used_bytes, self._size_bytes, is_full)

    async def verify(self, files: AttemptLayout) -> None:
        """Whoever writes to the host's own file system is told there."""

    async def close(self, files: AttemptLayout) -> None:
        """Nothing is to be let go of."""


async def _measure_unnamed(directory: Path) -> Unnamed:
    try:
        return await wait_in_thread(lambda: measure_unnamed(directory.stat().st_dev))
    except OSError as error:
        raise OSError(f"{_UNMEASURED}: {error}") from error


async def _count(directory: Path, unit: str) -> int:
    command = ("du", "-s", "-x", unit, "--", str(directory))
    told = b""
    try:
        if os.geteuid() != 0:
            # Else an agent could hide what it writes in a directory that it closes to reading.
            told = await run_command(*AS_OWNER_OF_ALL, *command, good_codes=(0, 1))
        told = told or await run_command(*command, good_codes=(0, 1))
        return int(told.split()[0])
    except (CommandFailedError, ValueError, IndexError) as error:
        raise OSError(f"{_UNMEASURED}: {error}") from error
