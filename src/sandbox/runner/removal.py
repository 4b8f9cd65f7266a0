"""Removes what attempts left on disk."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from sandbox.runner.equipment import Attempt


def left_by_earlier_attempts(attempt: Attempt) -> list[Path]:
    """What runners made that died before they had a workspace, but for their logs."""
    roots = [root for root in attempt.files.root.parent.iterdir() if root != attempt.files.root]
    return [
        path for root in roots for path in root.iterdir() if path != attempt.task_files.attempt(root.name).runner_log
    ]


async def remove(paths: Sequence[Path]) -> None:
    """By rm(1), which no depth of directories exhausts, follows no link and can be stopped. Raises OSError."""
    if not paths:
        return
    command = ("rm", "-rf", "--one-file-system", "--", *map(str, paths))
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env={"PATH": "/usr/bin:/bin"}
    )
    try:
        _, complaint = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise OSError(complaint.decode(errors="replace").strip()[-500:])
