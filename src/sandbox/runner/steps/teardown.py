"""Teardown: nothing of the attempt is left but its journal, its artifacts and the runner's log."""

import asyncio
from pathlib import Path

from sandbox.contracts.runtime import SandboxHandle
from sandbox.model.event import Trouble
from sandbox.model.life import final_state
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.state import TaskState
from sandbox.runner.equipment import Attempt


async def teardown(attempt: Attempt, handle: SandboxHandle | None) -> None:
    """Destroy the sandbox and remove its files. Never raises: what is left is told in an event.

    The handle goes last: as long as it is there, somebody can finish the job.
    """
    try:
        async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
            if handle is not None:
                await attempt.equipment.runtime.destroy(handle, attempt.files.disk)
            await _remove(*_paths_to_remove(attempt))
            attempt.files.handle.unlink(missing_ok=True)
    except Exception as error:
        attempt.recorder.record(Trouble("teardown_failed", f"Something of the sandbox is left: {error}"))


def _paths_to_remove(attempt: Attempt) -> list[Path]:
    """A preserved sandbox keeps its file systems; who releases it removes them."""
    kept = {attempt.files.handle, attempt.files.runner_log}
    if final_state(attempt.task)[0] is TaskState.FAILED_PRESERVED:
        kept.add(attempt.files.disk)
    return [path for path in attempt.files.root.iterdir() if path not in kept]


async def _remove(*paths: Path) -> None:
    """By rm(1), which no depth of directories exhausts, follows no link and can be stopped."""
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
