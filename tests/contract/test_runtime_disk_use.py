"""The usage of a directory disk includes deleted files that the sandbox still has open."""

import asyncio
from pathlib import Path

from doubles.sandbox_lifecycle import MEBIBYTE, read_until, ready_sandbox
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.interfaces.runtime import Command, Runtime
from sandbox.interfaces.task_file_layout import AttemptLayout

_UNLINKED = "exec 3>/tmp/large; head -c 5000000 /dev/zero >&3; rm /tmp/large; echo ready; sleep 60"
_CLOSED = "exec 3>/tmp/large; head -c 5000000 /dev/zero >&3; rm /tmp/large; exec 3>&-; echo ready; sleep 60"


def is_full_during(runtime: Runtime, layout: AttemptLayout, script: str) -> bool:
    """Return whether a 4 MiB disk is full while the script is running."""

    async def scenario() -> bool:
        attempt_disk = DirectoryDisk(layout)
        await attempt_disk.open(4 * MEBIBYTE)
        async with ready_sandbox(runtime, layout.disk) as sandbox:
            output, _ = await sandbox.start(Command(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"ready")
            return (await attempt_disk.measure_and_trim()).is_full

    return asyncio.run(scenario())


def test_deleted_file_that_is_open_counts_as_usage(runtime: Runtime, tmp_path: Path):
    assert is_full_during(runtime, AttemptLayout(tmp_path / "attempt"), _UNLINKED)


def test_deleted_file_that_is_closed_does_not_count_as_usage(runtime: Runtime, tmp_path: Path):
    assert not is_full_during(runtime, AttemptLayout(tmp_path / "attempt"), _CLOSED)
