"""Teardown: nothing of the attempt is left but its journal, its artifacts and the runner's log."""

import asyncio
import shutil

from sandbox.contracts.runtime import SandboxHandle
from sandbox.model.event import Trouble
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.runner.equipment import Attempt


async def teardown(attempt: Attempt, handle: SandboxHandle | None) -> None:
    """Destroy the sandbox and remove its files. Never raises: what is left is told in an event."""
    try:
        async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
            if handle is not None:
                await attempt.equipment.runtime.destroy(handle, attempt.files.disk)
            await asyncio.to_thread(_remove_files, attempt)
    except Exception as error:
        attempt.recorder.record(Trouble("teardown_failed", f"Something of the sandbox is left: {error}"))


def _remove_files(attempt: Attempt) -> None:
    """The handle goes last: as long as it is there, somebody can finish the job."""
    for directory in (attempt.files.disk, attempt.files.repository):
        if directory.exists():
            shutil.rmtree(directory)
    attempt.files.handle.unlink(missing_ok=True)
