"""Stage: the repository becomes a workspace."""

from sandbox.model.event import WorkspacePrepared
from sandbox.runner.confining import confine_for
from sandbox.runner.equipment import Attempt
from sandbox.runner.leftovers import end_earlier_attempts, left_by_earlier_attempts


async def stage(attempt: Attempt) -> None:
    """Clone onto the attempt's disk. Raises AttemptError (clone_failed, provision_failed), OSError."""
    await end_earlier_attempts(attempt)
    await attempt.equipment.remove(left_by_earlier_attempts(attempt))
    manifest = attempt.task.manifest
    await attempt.equipment.disks.open(attempt.files, manifest.vm.disk_bytes)
    for directory in (attempt.files.home, attempt.files.tmp):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    base_commit = await attempt.equipment.workspaces.stage(
        manifest.repository, attempt.files.root, confine_for(attempt)
    )
    attempt.recorder.record(WorkspacePrepared(base_commit))
