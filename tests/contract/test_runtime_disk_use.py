"""What a sandbox has on a disk that is a directory is counted from outside, whoever keeps its files open there."""

import asyncio
from pathlib import Path

from doubles.sandbox_lifecycle import MEBIBYTE, living, read_until
from sandbox.disks.directory import DirectoryDisks
from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import Command, Runtime

_UNLINKED = "exec 3>/tmp/large; head -c 5000000 /dev/zero >&3; rm /tmp/large; echo there; sleep 60"
_CLOSED = "exec 3>/tmp/large; head -c 5000000 /dev/zero >&3; rm /tmp/large; exec 3>&-; echo there; sleep 60"


def used_while(runtime: Runtime, files: AttemptLayout, script: str) -> bool:
    """Whether a disk of 4 MiB is full while this goes on."""

    async def story() -> bool:
        disks = DirectoryDisks()
        await disks.open(files, 4 * MEBIBYTE)
        async with living(runtime, files.disk) as sandbox:
            output, _ = await sandbox.start(Command(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"there")
            return (await disks.usage(files)).is_full

    return asyncio.run(story())


def test_a_file_that_is_unlinked_and_open_inside_counts(runtime: Runtime, tmp_path: Path):
    assert used_while(runtime, AttemptLayout(tmp_path / "attempt"), _UNLINKED)


def test_a_file_that_is_unlinked_and_closed_inside_does_not(runtime: Runtime, tmp_path: Path):
    assert not used_while(runtime, AttemptLayout(tmp_path / "attempt"), _CLOSED)
