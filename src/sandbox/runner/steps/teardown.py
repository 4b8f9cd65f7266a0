"""Teardown step: removes what belongs to the attempt, except journal, artifacts, runner's log and preserved files."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import msgspec

from sandbox.interfaces.disks import Disk, RemovePaths
from sandbox.interfaces.runtime import Runtime, SandboxHandle
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.model.errors import error_reason
from sandbox.model.events import ErrorReported
from sandbox.model.failure import AttemptError, FailureCode, unfreed_memory_message
from sandbox.model.fixed_limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.state_machine import final_state
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import AttemptContext, read_handle


class TeardownStep(msgspec.Struct, frozen=True):
    """Destroys the sandbox of an attempt and removes its files."""

    attempt: AttemptContext
    runtime: Runtime
    disk: Disk
    remove_paths: RemovePaths

    async def run(self, handle: SandboxHandle | None) -> None:
        """Destroy the sandbox and remove its files. Never raises: an event reports a failure."""
        try:
            preserved = _preserved_paths(self.attempt)
            async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                await self._destroy(handle, preserved)
                await self._remove(preserved)
            self._require_freed_memory()
        except Exception as error:
            self.attempt.recorder.record(
                ErrorReported("teardown_failed", f"The sandbox was not removed completely: {error_reason(error)}")
            )

    async def run_for_follow_up(self, handle: SandboxHandle | None, *, keeps_disk: bool) -> None:
        """Destroy the sandbox and remove its files before a follow-up attempt. Unlike `run`, raises on failure.

        The next attempt must not start while processes of this attempt are alive, or if it could again use up memory
        that the kernel never frees. A disk that is kept for the next agent must be intact. Raises AttemptError
        (sandbox_lost, disk_full), OSError, TimeoutError.
        """
        preserved = files_for_resume(self.attempt.layout) if keeps_disk else ()
        async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
            await self._destroy(handle, preserved)
            if self.runtime.unfreed_bytes(self.attempt.id) and handle is not None:
                await self.runtime.destroy(handle, self.attempt.layout.disk)  # its files are collected next
            self._require_freed_memory()
            await self._remove(preserved, keeps_disk=keeps_disk)

    async def sync_disk(self) -> None:
        """Flush the disk, and require that it lost no written data, because a patch of incomplete files would be wrong.

        Raises AttemptError (disk_full).
        """
        try:
            await self.disk.sync()
        except OSError as error:
            message = f"The server's disk could not store everything that the agent wrote ({error.strerror})"
            raise AttemptError(
                FailureCode.DISK_FULL, f"{message}; free space on that disk and submit the task again."
            ) from error

    def _require_freed_memory(self) -> None:
        """Raise AttemptError (sandbox_lost) if the kernel never frees memory of the sandbox."""
        if unfreed_bytes := self.runtime.unfreed_bytes(self.attempt.id):
            raise AttemptError(FailureCode.SANDBOX_LOST, unfreed_memory_message(unfreed_bytes))

    async def _destroy(self, handle: SandboxHandle | None, preserved: Collection[Path]) -> None:
        files = self.attempt.layout
        await destroy_earlier_sandboxes(self.attempt, self.runtime)
        if handle is not None:
            await self.runtime.destroy(handle, files.disk if files.disk in preserved else None)

    async def _remove(self, preserved: Collection[Path], *, keeps_disk: bool = False) -> None:
        """Remove the handle last: as long as it exists, another process can finish the teardown."""
        files = self.attempt.layout
        if keeps_disk:
            await self.sync_disk()
        await self.disk.close()
        if files.host_git_directory not in preserved and files.host_git_directory.is_dir():
            # Move the repository away first, so it is never compared with a half-removed workspace.
            files.host_git_directory.rename(files.root / "repository.gone")
        kept_paths = {files.handle, files.runner_log, *preserved}
        earlier = [] if keeps_disk else earlier_attempt_files(self.attempt)
        await self.remove_paths([*(path for path in files.root.iterdir() if path not in kept_paths), *earlier])
        files.handle.unlink(missing_ok=True)


async def destroy_earlier_sandboxes(attempt: AttemptContext, runtime: Runtime) -> None:
    """Destroy earlier sandboxes that still have processes or a control group. Raises AttemptError (sandbox_lost)."""
    for earlier in attempt.earlier_layouts:
        handle = read_handle(earlier.handle)
        if handle is not None:
            await runtime.destroy(handle, earlier.disk)


def earlier_attempt_files(attempt: AttemptContext) -> list[Path]:
    """Return the files that earlier attempts' teardowns did not remove, except the runners' logs."""
    return [path for files in attempt.earlier_layouts for path in files.root.iterdir() if path != files.runner_log]


def files_for_resume(layout: AttemptLayout) -> list[Path]:
    """Return the files that a resumed attempt needs: the disk, the repository and the fingerprint of the secrets."""
    return [layout.disk_image, layout.disk, layout.host_git_directory, layout.secret_fingerprint]


def _preserved_paths(attempt: AttemptContext) -> Collection[Path]:
    """Return the files to keep until the sandbox is released; empty if the sandbox is not preserved."""
    if final_state(attempt.task)[0] is TaskState.FAILED_PRESERVED:
        return attempt.layout.disk, attempt.layout.disk_image, attempt.layout.secret_fingerprint
    return ()
