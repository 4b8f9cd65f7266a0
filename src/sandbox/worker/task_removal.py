"""Removes everything of tasks from this host."""

import asyncio
from collections.abc import Sequence

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.placement import AttemptFiles
from sandbox.model.fixed_limits import SANDBOX_TEARDOWN_SECONDS


async def remove_tasks(layouts: Sequence[TaskLayout], files: AttemptFiles, remove: RemovePaths) -> None:
    """Remove everything of these tasks from this host. No task may have a runner. Raises OSError, SandboxError."""
    task_ids = {layout.task_id for layout in layouts}
    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):  # a program in a sandbox can delay the search
        leftovers = (await files.scan()).leftovers
    for leftover in leftovers:
        if leftover.location.task_id in task_ids:
            async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                await files.clean_up(leftover, keeps_disk=False)
    await remove([layout.root for layout in layouts if layout.root.exists()])
