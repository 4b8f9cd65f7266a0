"""Waiting for the launcher to be ready and for a process to exit."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes.launcher_client import start_launcher, wait_readable

KERNEL_UID = 269_999 if os.geteuid() == 0 else None


async def end(launcher):
    launcher.kill()
    await launcher.wait()
    launcher.close()


async def test_failure_after_the_listeners_were_sent_is_reported():
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


async def test_two_waiters_are_both_notified():
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            waiters = [asyncio.create_task(wait_readable(pidfd)) for _ in range(2)]
            await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(30):
                await asyncio.gather(*waiters)
        finally:
            os.close(pidfd)


async def test_cancelled_waiter_does_not_affect_another_waiter():
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            waiter, cancelled = (asyncio.create_task(wait_readable(pidfd)) for _ in range(2))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(30):
                await waiter
        finally:
            os.close(pidfd)
