"""Runs the commands that create, check, mount and remove disks. No command outlives this process."""

import asyncio
from collections.abc import Collection
from contextlib import suppress

from sandbox.model.fixed_limits import DISK_COMMAND_TIMEOUT_SECONDS, KILL_TIMEOUT_SECONDS

_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""Prefix of a command that must not outlive this process: a leftover e2fsck could modify a disk after it is mounted."""

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CommandFailedError(Exception):
    """A command failed. The message is its error output on one line."""


async def run_command(*command: str, ok_codes: Collection[int] = (0,)) -> bytes:
    """Run a command and return its output.

    Raises CommandFailedError if the command fails, is not installed or takes longer than DISK_COMMAND_TIMEOUT_SECONDS.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *_DIE_WITH_PARENT,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_ENVIRONMENT,
        )
    except OSError as error:
        raise CommandFailedError(f"{_DIE_WITH_PARENT[0]} cannot be started ({error.strerror})") from error
    try:
        async with asyncio.timeout(DISK_COMMAND_TIMEOUT_SECONDS):
            output, stderr = await process.communicate()
    except TimeoutError:
        raise CommandFailedError(f"{command[0]} did not finish within {DISK_COMMAND_TIMEOUT_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_TIMEOUT_SECONDS)
    if process.returncode not in ok_codes:
        reason = " ".join(stderr.decode(errors="replace").split())[:500] or f"exit code {process.returncode}"
        raise CommandFailedError(f"{command[0]}: {reason}")
    return output
