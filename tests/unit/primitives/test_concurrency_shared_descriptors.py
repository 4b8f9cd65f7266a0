"""Several tasks that wait for a process to exit, through its pidfd."""

import asyncio
import os
import subprocess

from sandbox.primitives.concurrency import wait_readable_shared


async def test_two_waiters_are_both_notified():
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            waiters = [asyncio.create_task(wait_readable_shared(pidfd)) for _ in range(2)]
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
            waiter, cancelled = (asyncio.create_task(wait_readable_shared(pidfd)) for _ in range(2))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(30):
                await waiter
        finally:
            os.close(pidfd)
