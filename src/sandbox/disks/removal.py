"""Removes what sandboxes left on disk."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.model.limits import KILL_SECONDS

_PATH = "/usr/bin:/bin"

AS_NAMESPACE_ROOT = ("unshare", "--user", "--map-root-user")
"""Before a command: what it may do with files of its user does not depend on their modes, which agents choose."""


async def remove_trees(paths: Sequence[Path]) -> None:
    """By rm(1), which no depth of directories exhausts, follows no link and can be stopped. Raises OSError.

    An ordinary user may not empty a directory that is closed to writing; root of a user namespace may.
    """
    if not paths:
        return
    command = ("rm", "-rf", "--one-file-system", "--", *map(str, paths))
    complaint = await _run(command)
    if complaint and os.geteuid() != 0 and not await _run((*AS_NAMESPACE_ROOT, *command)):
        return
    if complaint:
        raise OSError(complaint)


async def _run(command: Sequence[str]) -> str:
    """What it complains about, nothing when all went well."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env={"PATH": _PATH}
    )
    try:
        _, complaint = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        # Where the file system hangs, the kernel lets it not die.
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILL_SECONDS)
        raise
    if process.returncode == 0:
        return ""
    return complaint.decode(errors="replace").strip()[-500:] or f"{command[0]} ended with {process.returncode}"
