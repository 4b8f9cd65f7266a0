"""Teardown: nothing of the attempt is left but its journal, its artifacts and the runner's log."""

import asyncio
from collections.abc import Collection
from pathlib import Path

from sandbox.interfaces.runtime import SandboxHandle
from sandbox.model.errors import AttemptError, FailureCode, reason_of
from sandbox.model.events import Trouble
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.state_machine import final_state
from sandbox.model.task_state import TaskState
from sandbox.runner.dependencies import Attempt
from sandbox.runner.earlier_attempts import end_earlier_attempts, kept_for_resuming, left_by_earlier_attempts


async def teardown(attempt: Attempt, handle: SandboxHandle | None) -> None:
    """Destroy the sandbox and remove its files. Never raises: what is left is told in an event."""
    try:
        kept = _kept_for_user(attempt)
        async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
            await _remove(attempt, handle, kept)
    except Exception as error:
        attempt.recorder.record(Trouble("teardown_failed", f"Something of the sandbox is left: {reason_of(error)}"))


async def clear_away(attempt: Attempt, handle: SandboxHandle | None, *, keeps_disk: bool) -> None:
    """The same for an attempt that another one follows, which must not begin while anything of this one lives.

    Where the disk is kept, another agent goes on with it: it has to be whole.
    Raises AttemptError (sandbox_lost, disk_full), OSError, TimeoutError.
    """
    kept = kept_for_resuming(attempt.files) if keeps_disk else ()
    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
        await _remove(attempt, handle, kept, hands_on=keeps_disk)


async def verify_disk(attempt: Attempt) -> None:
    """A patch of files that lost what was written to them would be a lie. Raises AttemptError (disk_full)."""
    try:
        await attempt.equipment.disks.verify(attempt.files)
    except OSError as error:
        what = f"The server's disk could not store all that the agent wrote ({error.strerror})"
        raise AttemptError(FailureCode.DISK_FULL, f"{what}; make room there and submit the task again.") from error


async def _remove(
    attempt: Attempt, handle: SandboxHandle | None, kept: Collection[Path], *, hands_on: bool = False
) -> None:
    """The handle goes last: as long as it is there, somebody can finish the job."""
    files = attempt.files
    await end_earlier_attempts(attempt)
    if handle is not None:
        await attempt.equipment.runtime.destroy(handle, files.disk if files.disk in kept else None)
    if hands_on:
        await verify_disk(attempt)
    await attempt.equipment.disks.close(files)
    if files.repository not in kept and files.repository.is_dir():
        # Goes at once, so that nobody compares with it what is left of a workspace that is half removed.
        files.repository.rename(files.root / "repository.gone")
    spared = {files.handle, files.runner_log, *kept}
    earlier = [] if hands_on else left_by_earlier_attempts(attempt)
    await attempt.equipment.remove([*(path for path in files.root.iterdir() if path not in spared), *earlier])
    files.handle.unlink(missing_ok=True)


def _kept_for_user(attempt: Attempt) -> Collection[Path]:
    """A preserved sandbox keeps its file systems; who releases it removes them."""
    if final_state(attempt.task)[0] is TaskState.FAILED_PRESERVED:
        return attempt.files.disk, attempt.files.disk_image, attempt.files.secret_fingerprint
    return ()
