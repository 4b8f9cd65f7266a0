"""Stage: the repository becomes a workspace."""

from sandbox.model.event import WorkspacePrepared
from sandbox.runner.equipment import Attempt
from sandbox.runner.removal import left_by_earlier_attempts, remove


async def stage(attempt: Attempt) -> None:
    """Clone into the attempt's directory. Raises AttemptError (clone_failed), OSError."""
    await remove(left_by_earlier_attempts(attempt))
    repository = attempt.task.manifest.repository
    for directory in (attempt.files.home, attempt.files.tmp):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    base_commit = await attempt.equipment.workspaces.stage(repository, attempt.files.root)
    attempt.recorder.record(WorkspacePrepared(base_commit))
