"""Prepares the workspace (the state `staging`), from a clone or from the previous attempt's disk."""

import asyncio
from typing import Protocol

import msgspec

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk, RemovePaths
from sandbox.interfaces.runtime import Confine, Runtime
from sandbox.interfaces.workspace import Workspaces
from sandbox.model.events import WorkspacePrepared
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.primitives.files import fsync_path, write_durably
from sandbox.primitives.secret_digests import make_fingerprint, matches_fingerprint
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.parent_task_results import find_inherited_patches
from sandbox.runner.steps.teardown import destroy_earlier_sandboxes, earlier_attempt_files, files_for_resume
from sandbox.runner.task_limits import remaining_seconds


class WorkspaceSource(Protocol):
    """Provides the workspace of an attempt."""

    async def prepare_disk(self) -> None:
        """Prepare the files of the attempt before its disk is opened.

        Raises AttemptError (secret_unavailable), OSError.
        """
        ...

    async def prepare_workspace(self) -> str:
        """Prepare the workspace on the open disk; return the base commit.

        Raises AttemptError (clone_failed, sandbox_lost), OSError.
        """
        ...


class ClonedWorkspace(msgspec.Struct, frozen=True):
    """Clones the repository. confine: confines git."""

    attempt: AttemptContext
    workspaces: Workspaces
    confine: Confine

    async def prepare_disk(self) -> None:
        """Store the fingerprint of the secrets that the agent will have."""
        if self.attempt.secrets:
            fingerprint = await asyncio.to_thread(make_fingerprint, self.attempt.secrets)
            # Do not use a thread: it could not be cancelled, and might still write while the attempt is finalized.
            write_durably(self.attempt.layout.secret_fingerprint, fingerprint)

    async def prepare_workspace(self) -> str:
        """Clone the repository, and commit the work that the task inherits."""
        attempt, manifest = self.attempt, self.attempt.task.manifest
        patches = await asyncio.to_thread(find_inherited_patches, attempt)
        return await self.workspaces.stage(
            manifest.repository, attempt.layout.root, self.confine, manifest.vm.disk_bytes, patches
        )


class ResumedWorkspace(msgspec.Struct, frozen=True):
    """Takes over the disk of the previous attempt."""

    attempt: AttemptContext

    async def prepare_disk(self) -> None:
        """Move the disk, and require that the secrets are unchanged."""
        # Do not use a thread: it could not be cancelled, and might still move files while the attempt is finalized.
        take_over_files(self.attempt)
        await require_same_secrets(self.attempt)

    async def prepare_workspace(self) -> str:
        """Return the base commit of the previous attempt."""
        if (base_commit := self.attempt.task.base_commit) is None:
            message = "The disk of the previous attempt has no workspace; submit the task again."
            raise AttemptError(FailureCode.SANDBOX_LOST, message)
        return base_commit


class PrepareWorkspaceStep(msgspec.Struct, frozen=True):
    """Prepares the disk and the workspace of an attempt. runtime: destroys sandboxes of earlier attempts."""

    attempt: AttemptContext
    source: WorkspaceSource
    runtime: Runtime
    disk: Disk
    remove_paths: RemovePaths
    clock: Clock

    async def run(self) -> None:
        """Open the attempt's disk and prepare its workspace.

        Raises AttemptError (clone_failed, provision_failed, sandbox_lost, secret_unavailable, timeout), OSError.
        """
        attempt, manifest = self.attempt, self.attempt.task.manifest
        if remaining_seconds(attempt.task, self.clock) <= 0:
            limit = manifest.lifecycle.timeout
            raise AttemptError(
                FailureCode.TIMEOUT, f"The task exceeded its timeout of {limit}; raise lifecycle.timeout."
            )
        await destroy_earlier_sandboxes(attempt, self.runtime)
        await self.source.prepare_disk()
        await self.remove_paths(earlier_attempt_files(attempt))
        await self.disk.open(manifest.vm.disk_bytes)
        for directory in (attempt.layout.home, attempt.layout.tmp):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        attempt.recorder.record(WorkspacePrepared(await self.source.prepare_workspace()))


def take_over_files(attempt: AttemptContext) -> None:
    """Move the preserved files of an earlier attempt into the directory of this attempt.

    Files that a dead runner of this attempt has already moved are not moved again. Raises OSError.
    """
    for files in attempt.earlier_layouts:
        for old, new in zip(files_for_resume(files), files_for_resume(attempt.layout), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    fsync_path(attempt.layout.root)


async def require_same_secrets(attempt: AttemptContext) -> None:
    """Require unchanged secret values: a resumed agent may print old values, which could not be redacted.

    Raises AttemptError (secret_unavailable), OSError.
    """
    if attempt.secrets and not await asyncio.to_thread(
        matches_fingerprint, attempt.layout.secret_fingerprint, attempt.secrets
    ):
        message = "The secrets may have changed since the agent started, so only a new attempt or task can continue."
        raise AttemptError(FailureCode.SECRET_UNAVAILABLE, message)
