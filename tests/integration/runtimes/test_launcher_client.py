"""The end of a process is told to everybody who waits for it."""

import asyncio
import os
import subprocess

from sandbox.runtimes.launcher_client import wait_readable


def test_two_who_wait_for_one_process_are_both_told():
    async def story():
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
            ended = os.pidfd_open(process.pid)
            try:
                waiting = [asyncio.create_task(wait_readable(ended)) for _ in range(2)]
                await asyncio.sleep(0)
                process.stdin.close()
                async with asyncio.timeout(30):
                    await asyncio.gather(*waiting)
            finally:
                os.close(ended)

    asyncio.run(story())


def test_one_who_gives_up_takes_nothing_from_the_other():
    async def story():
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
            ended = os.pidfd_open(process.pid)
            try:
                stays, leaves = (asyncio.create_task(wait_readable(ended)) for _ in range(2))
                await asyncio.sleep(0)
                leaves.cancel()
                await asyncio.sleep(0)
                process.stdin.close()
                async with asyncio.timeout(30):
                    await stays
            finally:
                os.close(ended)

    asyncio.run(story())
