"""Polls what the host's kernel holds for a sandbox, with bounded CPU usage."""

import asyncio
from collections.abc import Awaitable, Callable

from sandbox.interfaces.runtime import FileUsage, KernelUsage
from sandbox.model.limits import FILE_USAGE_CHECK_SECONDS, KERNEL_USAGE_CHECK_SECONDS

_IDLE_FACTOR = 10
"""The pause after a measurement is at least this multiple of its duration."""


async def wait_for_violation(
    kernel_usage: Callable[[], Awaitable[KernelUsage]], file_usage: Callable[[], Awaitable[FileUsage]]
) -> str:
    """Return why the sandbox must end. Each kind is polled separately, because one may take long."""
    polls = [
        asyncio.create_task(_poll_for_violation(kernel_usage, KERNEL_USAGE_CHECK_SECONDS)),
        asyncio.create_task(_poll_for_violation(file_usage, FILE_USAGE_CHECK_SECONDS)),
    ]
    try:
        done, _ = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for poll in polls:
            poll.cancel()


async def _poll_for_violation(measure: Callable[[], Awaitable[KernelUsage | FileUsage]], seconds: float) -> str:
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        violation = (await measure()).find_violation()
        if violation:
            return violation
        await asyncio.sleep(max(seconds, _IDLE_FACTOR * (loop.time() - began)))
