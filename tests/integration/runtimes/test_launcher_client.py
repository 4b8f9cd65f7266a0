"""Waiting for the exit of a process."""

import asyncio
import os
import subprocess

from sandbox.runtimes.launcher_client import wait_readable


def test_two_waiters_are_both_notified():
    async def scenario():
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

    asyncio.run(scenario())


def test_cancelled_waiter_does_not_affect_the_other():
    async def scenario():
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

    asyncio.run(scenario())
