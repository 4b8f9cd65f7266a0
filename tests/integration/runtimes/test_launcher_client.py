"""Waiting for the launcher to be ready."""

import os
from pathlib import Path

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes.launcher_client import start_launcher

KERNEL_UID = 269_999 if os.geteuid() == 0 else None


async def end(launcher):
    launcher.kill()
    await launcher.wait()
    launcher.close()


async def test_failure_after_the_launcher_has_sent_the_listeners_is_reported():
    launcher = start_launcher("abcdefghijkl", KERNEL_UID, {}, seccomp_filter=b"\xff" * 8)
    try:
        with pytest.raises(AttemptError, match=r"could not be created: .*seccomp"):
            await launcher.wait_ready()
    finally:
        await end(launcher)


async def test_ready_launcher_is_confined():
    launcher = start_launcher("abcdefghijkl", KERNEL_UID, {})
    try:
        listeners = await launcher.wait_ready()
        status = Path(f"/proc/{launcher.pid}/status").read_text().splitlines()
        uids = next(line.split()[1:] for line in status if line.startswith("Uid:"))
        assert set(uids) == {str(os.getuid() if KERNEL_UID is None else KERNEL_UID)}
        listeners.close()
    finally:
        await end(launcher)
