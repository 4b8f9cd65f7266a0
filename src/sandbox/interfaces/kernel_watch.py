"""Polls what the host's kernel holds for a sandbox, with bounded CPU usage."""

import asyncio
from collections.abc import Awaitable, Callable

from sandbox.interfaces.runtime import FileUsage, KernelUsage
from sandbox.model.limits import FILE_USAGE_CHECK_SECONDS, KERNEL_USAGE_CHECK_SECONDS

_PAUSE_FACTOR = 10
_PAUSE_SECONDS_MAX = 3.0
"""The pause after a measurement: this multiple of its duration, but no longer than the maximum."""

_WAITS_MAX = 10
_WAIT_SECONDS = 0.5
"""Number and duration of the waits for one measurement, which may need locks that programs inside hold. If the event
loop stops, for example because the machine is suspended, that counts as one wait.
"""


async def wait_for_violation(
    kernel_usage: Callable[[], Awaitable[KernelUsage]],
    file_counts: Callable[[], Awaitable[FileUsage]],
    detailed_file_usage: Callable[[], Awaitable[FileUsage]],
) -> str:
    """Wait until the sandbox exceeds a limit; return why it must end. Each kind of usage is polled separately.

    Measuring one kind may take long and must not delay the others.
    """
    polls = [
        asyncio.create_task(_poll_for_violation(kernel_usage, KERNEL_USAGE_CHECK_SECONDS)),
        asyncio.create_task(_poll_for_violation(file_counts, FILE_USAGE_CHECK_SECONDS)),
        asyncio.create_task(_poll_for_violation(detailed_file_usage, FILE_USAGE_CHECK_SECONDS)),
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
        started_at = loop.time()
        usage = await _measure_in_time(measure)
        violation = _NOT_MEASURED if usage is None else usage.find_violation()
        if violation:
            return violation
        await asyncio.sleep(max(seconds, min(_PAUSE_FACTOR * (loop.time() - started_at), _PAUSE_SECONDS_MAX)))


_NOT_MEASURED = (
    f"The sandbox's files and sockets could not be counted within {_WAITS_MAX * _WAIT_SECONDS:.0f} s; use fewer."
)


async def _measure_in_time(
    measure: Callable[[], Awaitable[KernelUsage | FileUsage]],
) -> KernelUsage | FileUsage | None:
    measurement = asyncio.ensure_future(measure())
    try:
        for _ in range(_WAITS_MAX):
            done, _ = await asyncio.wait([measurement], timeout=_WAIT_SECONDS)
            if done:
                return measurement.result()
        return None
    finally:
        measurement.cancel()
