"""Teardown: nothing of the attempt is left but its journal, its artifacts and the runner's log."""

import asyncio
from pathlib import Path

from sandbox.contracts.runtime import SandboxHandle
from sandbox.model.event import Trouble
from sandbox.model.life import final_state
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.state import TaskState
from sandbox.runner.equipment import Attempt
from sandbox.runner.leftovers import end_earlier_attempts, left_by_earlier_attempts


async def teardown(attempt: Attempt, handle: SandboxHandle | None) -> None:
    """Destroy the sandbox and remove its files. Never raises: what is left is told in an event.

    The handle goes last: as long as it is there, somebody can finish the job.
    """
    try:
        async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
            await end_earlier_attempts(attempt)
            if handle is not None:
                await attempt.equipment.runtime.destroy(handle, attempt.files.disk)
            await attempt.equipment.disks.close(attempt.files)
            await attempt.equipment.remove([*_paths_to_remove(attempt), *left_by_earlier_attempts(attempt)])
            attempt.files.handle.unlink(missing_ok=True)
    except Exception as error:
        attempt.recorder.record(Trouble("teardown_failed", f"Something of the sandbox is left: {error}"))


def _paths_to_remove(attempt: Attempt) -> list[Path]:
    """A preserved sandbox keeps its file systems; who releases it removes them."""
    kept = {attempt.files.handle, attempt.files.runner_log}
    if final_state(attempt.task)[0] is TaskState.FAILED_PRESERVED:
        kept |= {attempt.files.disk, attempt.files.disk_image}
    return [path for path in attempt.files.root.iterdir() if path not in kept]
