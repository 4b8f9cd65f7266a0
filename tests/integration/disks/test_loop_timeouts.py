"""A command that the kernel does not let die (a file system that hangs) keeps nobody waiting."""

import asyncio
import os
import signal

import pytest

from sandbox.disks.loop import CommandFailedError, run_command
from sandbox.disks.removal import remove_trees


@pytest.fixture
def undying(monkeypatch):
    """Kill does nothing; what was started is ended after the test."""
    started = []
    monkeypatch.setattr("asyncio.subprocess.Process.kill", lambda process: started.append(process.pid))
    monkeypatch.setattr("sandbox.disks.removal.KILL_SECONDS", 0.1, raising=False)
    monkeypatch.setattr("sandbox.disks.loop.KILL_SECONDS", 0.1, raising=False)

    def end():
        for process_id in started:
            os.kill(process_id, signal.SIGKILL)

    yield end
    assert started


async def within_a_moment(work, end):
    try:
        async with asyncio.timeout(5):
            await work
    finally:
        end()
        await asyncio.sleep(0.1)  # for the loop to hear of it


def test_a_command_for_a_disk_that_does_not_die_is_given_up(undying, monkeypatch):
    monkeypatch.setattr("sandbox.disks.loop.DISK_COMMAND_SECONDS", 0.1)
    with pytest.raises(CommandFailedError, match="takes too long"):
        asyncio.run(within_a_moment(run_command("sleep", "60"), undying))


def test_a_removal_that_does_not_die_is_given_up(undying, monkeypatch, tmp_path):
    (tmp_path / "rm").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "rm").chmod(0o755)
    monkeypatch.setattr("sandbox.disks.removal._PATH", f"{tmp_path}:/usr/bin:/bin", raising=False)

    async def removal():
        async with asyncio.timeout(0.5):
            await remove_trees([tmp_path / "x"])

    with pytest.raises(TimeoutError):
        asyncio.run(within_a_moment(removal(), undying))
