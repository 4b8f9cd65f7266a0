"""Stage step: clones the repository, or takes over the previous attempt's disk."""

import asyncio

import msgspec

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk, RemovePaths
from sandbox.interfaces.runtime import Confine, Runtime
from sandbox.interfaces.workspace import Workspaces
from sandbox.model.events import WorkspacePrepared
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.inheritance import find_inherited_patches
from sandbox.runner.progress import remaining_seconds
from sandbox.runner.steps.teardown import destroy_earlier_sandboxes, earlier_attempt_files, files_for_resume
from sandbox.system.files import fsync_path, write_durably
from sandbox.system.secret_fingerprint import make_fingerprint, matches_fingerprint


class StageStep(msgspec.Struct, frozen=True):
    """Prepares the workspace of an attempt. confine: confines git; runtime: destroys sandboxes of earlier attempts."""

    attempt: AttemptContext
    workspaces: Workspaces
    confine: Confine
    runtime: Runtime
    disk: Disk
    remove: RemovePaths
    clock: Clock

    async def run(self) -> None:
        """Clone onto the attempt's disk, or take over a disk.

        Raises AttemptError (clone_failed, provision_failed, secret_unavailable, timeout), OSError.
        """
        attempt, manifest = self.attempt, self.attempt.task.manifest
        if remaining_seconds(attempt.task, self.clock) <= 0:
            limit = manifest.lifecycle.timeout
            raise AttemptError(
                FailureCode.TIMEOUT, f"The task exceeded its timeout of {limit}; raise lifecycle.timeout."
            )
        await destroy_earlier_sandboxes(attempt, self.runtime)
        if attempt.resumes:
            # A thread could not be cancelled, so it might still move files while the attempt is being finalized.
            take_over_files(attempt)
            await require_same_secrets(attempt)
        elif attempt.secrets:
            await _write_fingerprint(attempt)
        await self.remove(earlier_attempt_files(attempt))
        await self.disk.open(manifest.vm.disk_bytes)
        for directory in (attempt.layout.home, attempt.layout.tmp):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        attempt.recorder.record(WorkspacePrepared(await self._prepare_workspace()))

    async def _prepare_workspace(self) -> str:
        """Return the base commit."""
        attempt, manifest = self.attempt, self.attempt.task.manifest
        if attempt.resumes:
            if (base_commit := attempt.task.base_commit) is None:
                message = "The disk of the previous attempt has no workspace; submit the task again."
                raise AttemptError(FailureCode.SANDBOX_LOST, message)
            return base_commit
        disk_bytes = manifest.vm.disk_bytes
        patches = await asyncio.to_thread(find_inherited_patches, attempt)
        return await self.workspaces.stage(manifest.repository, attempt.layout.root, self.confine, disk_bytes, patches)


def take_over_files(attempt: AttemptContext) -> None:
    """Move the preserved files of an earlier attempt into this one's directory.

    Files that a dead runner of this attempt has already moved are not moved again. Raises OSError.
    """
    for files in attempt.earlier_layouts:
        for old, new in zip(files_for_resume(files), files_for_resume(attempt.layout), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    fsync_path(attempt.layout.root)


async def require_same_secrets(attempt: AttemptContext) -> None:
    """Require unchanged secret values: a resumed agent may print old ones, which could not be redacted.

    Raises AttemptError (secret_unavailable), OSError.
    """
    if attempt.secrets and not await asyncio.to_thread(
        matches_fingerprint, attempt.layout.secret_fingerprint, attempt.secrets
    ):
        message = "The secrets may have changed since the agent started, so only a new attempt or task can continue."
        raise AttemptError(FailureCode.SECRET_UNAVAILABLE, message)


async def _write_fingerprint(attempt: AttemptContext) -> None:
    fingerprint = await asyncio.to_thread(make_fingerprint, attempt.secrets)
    # A thread could not be cancelled, so it might still write while the attempt is being finalized.
    write_durably(attempt.layout.secret_fingerprint, fingerprint)
