"""Stage step: clones the repository, or takes over the previous attempt's disk."""

import asyncio

from sandbox.interfaces.secrets import make_fingerprint, matches_fingerprint
from sandbox.model.events import WorkspacePrepared
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runner.attempt_takeover import destroy_earlier_sandboxes, earlier_attempt_files, take_over_files
from sandbox.runner.dependencies import AttemptContext
from sandbox.runner.progress import remaining_seconds
from sandbox.runner.steps.provision import make_confine
from sandbox.system.files import replace_durably


async def stage(attempt: AttemptContext) -> None:
    """Clone onto the attempt's disk, or take over a disk.

    Raises AttemptError (clone_failed, provision_failed, secret_unavailable, timeout), OSError.
    """
    lifecycle = attempt.task.manifest.lifecycle
    if remaining_seconds(attempt.task, attempt.dependencies.clock) <= 0:
        raise AttemptError(
            FailureCode.TIMEOUT, f"The task exceeded its timeout of {lifecycle.timeout}; raise lifecycle.timeout."
        )
    await destroy_earlier_sandboxes(attempt)
    if attempt.resumes:
        # Not in a thread: it cannot be cancelled, so it might still move files while the stopped attempt is being
        # finalized.
        take_over_files(attempt)
        await require_same_secrets(attempt)
    elif attempt.secrets:
        await _write_fingerprint(attempt)
    await attempt.dependencies.remove(earlier_attempt_files(attempt))
    manifest = attempt.task.manifest
    await attempt.dependencies.disks.open(attempt.layout, manifest.vm.disk_bytes)
    for directory in (attempt.layout.home, attempt.layout.tmp):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    attempt.recorder.record(WorkspacePrepared(await _prepare_workspace(attempt)))


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
    path = attempt.layout.secret_fingerprint
    fingerprint = await asyncio.to_thread(make_fingerprint, attempt.secrets)
    # Not in a thread: it cannot be cancelled, so it might still write while the stopped attempt is being finalized.
    part = path.with_suffix(".part")
    part.write_bytes(fingerprint)
    replace_durably(part, path)


async def _prepare_workspace(attempt: AttemptContext) -> str:
    """Return the base commit."""
    if attempt.resumes:
        if (base_commit := attempt.task.base_commit) is None:
            raise AttemptError(FailureCode.SANDBOX_LOST, "The disk of the previous attempt has no workspace.")
        return base_commit
    manifest, workspaces = attempt.task.manifest, attempt.dependencies.workspaces
    confine, disk_bytes = make_confine(attempt), manifest.vm.disk_bytes
    return await workspaces.stage(manifest.repository, attempt.layout.root, confine, disk_bytes)
