"""Runs the system's programs for disks."""

import asyncio
from collections.abc import Collection
from contextlib import suppress

from sandbox.model.limits import DISK_COMMAND_SECONDS, KILL_SECONDS

_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
"""A check of a killed process's that goes on would change a disk that the next process has mounted already."""

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CommandFailedError(Exception):
    """What the program said, on one line."""


async def run_command(*command: str, good_codes: Collection[int] = (0,)) -> bytes:
    """Its output. Raises CommandFailedError, also past DISK_COMMAND_SECONDS or when it is not installed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_ENDS_WITH_US,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_ENVIRONMENT,
        )
    except OSError as error:
        raise CommandFailedError(f"{_ENDS_WITH_US[0]} does not start ({error.strerror})") from error
    try:
        async with asyncio.timeout(DISK_COMMAND_SECONDS):
            output, complaint = await process.communicate()
    except TimeoutError:
        raise CommandFailedError(f"{command[0]} takes too long") from None
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_SECONDS)
    if process.returncode not in good_codes:
        said = " ".join(complaint.decode(errors="replace").split())[:500] or f"it ended with {process.returncode}"
        raise CommandFailedError(f"{command[0]}: {said}")
    return output
