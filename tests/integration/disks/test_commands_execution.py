"""A command that cannot be killed, for example on a hanging file system, does not block its caller."""

import asyncio
import os
import signal

import pytest

from sandbox.disks.commands import CommandFailedError, remove_trees, run_command


@pytest.fixture
def unkillable_processes(monkeypatch):
    """Disable `Process.kill`; yield a function that kills the started processes."""
    started = []
    monkeypatch.setattr("asyncio.subprocess.Process.kill", lambda process: started.append(process.pid))
    monkeypatch.setattr("sandbox.disks.commands.KILL_TIMEOUT_SECONDS", 0.1)

    def kill_processes():
        for process_id in started:
            os.kill(process_id, signal.SIGKILL)

    yield kill_processes
    assert started


async def with_timeout(awaitable, kill_processes):
    try:
        async with asyncio.timeout(5):
            await awaitable
    finally:
        kill_processes()
        await asyncio.sleep(0.1)  # until the event loop detects the exit


async def test_unkillable_disk_command_is_abandoned(unkillable_processes, monkeypatch):
    monkeypatch.setattr("sandbox.disks.commands.DISK_COMMAND_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(CommandFailedError, match="did not finish within"):
        await with_timeout(run_command("sleep", "60"), unkillable_processes)


async def test_unkillable_removal_is_abandoned(unkillable_processes, monkeypatch, tmp_path):
    (tmp_path / "rm").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "rm").chmod(0o755)
    monkeypatch.setattr("sandbox.disks.commands._PATH", f"{tmp_path}:/usr/bin:/bin", raising=False)

    async def removal():
        async with asyncio.timeout(0.5):
            await remove_trees([tmp_path / "x"])

    with pytest.raises(TimeoutError):
        await with_timeout(removal(), unkillable_processes)
