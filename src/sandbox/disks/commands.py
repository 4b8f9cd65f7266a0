"""Runs the commands that create, check and mount disks, and that remove the files that sandboxes left on disk."""

import asyncio
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

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


_PATH = "/usr/bin:/bin"

NAMESPACE_ROOT_COMMAND = ("unshare", "--user", "--map-root-user")
"""Prefix that runs a command as root in a user namespace, so that file modes set by agents do not prevent access."""


async def remove_trees(paths: Sequence[Path]) -> None:
    """Remove trees with rm(1), which handles any depth, follows no links and can be stopped. Raises OSError.

    The disk space of the files in `paths` becomes free even if they are still in use.

    An ordinary user cannot empty a directory that lacks write permission; the root user of a user namespace can.
    """
    if not paths:
        return
    # The kernel may keep a removed disk in use: files that a sandbox sent over a socket can outlive the sandbox.
    files = [str(path) for path in paths if path.is_file() and not path.is_symlink()]
    if files:
        await _run_removal(("truncate", "--no-create", "--size=0", "--", *files))
    command = ("rm", "-rf", "--one-file-system", "--", *map(str, paths))
    stderr = await _run_removal(command)
    if stderr and os.geteuid() != 0 and not await _run_removal((*NAMESPACE_ROOT_COMMAND, *command)):
        return
    if stderr:
        raise OSError(stderr)


async def _run_removal(command: Sequence[str]) -> str:
    """Run the command and return its error output; empty on success."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env={"PATH": _PATH}
    )
    try:
        _, stderr = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        # If the file system hangs, SIGKILL does not end the process.
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILL_TIMEOUT_SECONDS)
        raise
    if process.returncode == 0:
        return ""
    return stderr.decode(errors="replace").strip()[-500:] or f"{command[0]}: exit code {process.returncode}"
