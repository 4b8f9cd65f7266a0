"""The files of attempts on this machine, and their leftovers: sandboxes and disks."""

import asyncio
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import (
    AttemptLayout,
    TaskLayout,
    tasks_root,
)
from sandbox.interfaces.placement import AttemptLocation, Leftover, LeftoverScan, LeftoverSource
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.primitives.secret_values_fingerprint import matches_fingerprint


class LocalAttemptFiles:
    """Implements `interfaces.placement.AttemptFiles` for one data directory.

    leftover_sources: in the order in which their leftovers are removed; files are removed last.
    """

    def __init__(self, data_dir: Path, leftover_sources: Sequence[LeftoverSource], remove: RemovePaths) -> None:
        self._data_dir = data_dir
        self._leftover_sources = leftover_sources
        self._remove = remove

    def has_disk(self, location: AttemptLocation) -> bool:
        """Return whether the disk exists, as a directory or as an image. Implements `AttemptFiles.has_disk`."""
        return has_disk(self._layout(location))

    def has_disk_or_handle(self, location: AttemptLocation) -> bool:
        """Implements `AttemptFiles.has_disk_or_handle`."""
        return has_disk_or_handle(self._layout(location))

    def has_same_secrets(self, location: AttemptLocation, secrets: Mapping[str, str]) -> bool:
        """Compare the secrets with the fingerprint next to the disk. Implements `AttemptFiles.has_same_secrets`."""
        return matches_fingerprint(self._layout(location).secret_fingerprint, secrets)

    def has_sandbox_handle(self, task_id: str) -> bool:
        """Return whether any attempt has a handle. Implements `AttemptFiles.has_sandbox_handle`."""
        return any(layout.handle.exists() for layout in TaskLayout(self._data_dir, task_id).attempts())

    async def scan(self) -> LeftoverScan:
        """Scan the host, then the directories. Implements `AttemptFiles.scan`.

        This order ensures that no leftover of a new attempt looks unowned: an attempt's directory is the first thing
        that is created.
        """
        # Use daemon threads: a program in a sandbox can block reads of its arguments in /proc until its task ends.
        found = {
            source.kind: frozenset(await run_in_daemon_thread(source.attempt_ids)) for source in self._leftover_sources
        }
        return await asyncio.to_thread(self._scan_directories, found)

    def _scan_directories(self, found: Mapping[str, Collection[str]]) -> LeftoverScan:
        failures: list[str] = []
        attempts = dict(_list_attempts(self._data_dir, failures))
        leftovers = []
        for attempt_id, (task_id, has_files) in attempts.items():
            kinds = [kind for kind, attempt_ids in found.items() if attempt_id in attempt_ids]
            if has_files or kinds:
                location = AttemptLocation(task_id, attempt_id, "")
                leftovers.append(Leftover(location, kinds, self._layout(location).handle.exists()))
        own_kinds = [source.kind for source in self._leftover_sources if source.belongs_to_this_server and not failures]
        return LeftoverScan(leftovers, {kind: found[kind] - attempts.keys() for kind in own_kinds}, failures)

    async def clean_up(self, leftover: Leftover, *, keeps_disk: bool) -> None:
        """Clean up leftovers of all kinds, even those that the scan did not find.

        For example, some parts of a sandbox can be identified only by its handle. Implements `AttemptFiles.clean_up`.
        """
        layout = self._layout(leftover.location)
        for source in self._leftover_sources:
            await source.clean_up(leftover.location.attempt_id, layout)
        if not keeps_disk:
            kept = (layout.runner_log, layout.handle)
            await self._remove([path for path in layout.root.iterdir() if path not in kept])
        layout.handle.unlink(missing_ok=True)

    async def clean_up_unowned(self, kind: str, attempt_id: str) -> None:
        """Implements `AttemptFiles.clean_up_unowned`."""
        layout = TaskLayout(self._data_dir, attempt_id).attempt(attempt_id)
        for source in self._leftover_sources:
            if source.kind == kind:
                await source.clean_up(attempt_id, layout)

    async def remove_preserved(self, layout: AttemptLayout) -> None:
        """Remove the preserved files of an attempt.

        The handle and then the lock are removed last: without the lock, a debug session could start on half-removed
        files. A handle belongs to a debug session whose runner was killed. Its sandbox is destroyed first.
        """
        for source in self._leftover_sources if layout.handle.exists() else ():
            await source.clean_up(layout.root.name, layout)
        removed_last = (layout.handle, layout.preserved_disk_lock, layout.runner_log)
        paths = await asyncio.to_thread(lambda: list(layout.root.iterdir()))
        await self._remove([path for path in paths if path not in removed_last])
        layout.handle.unlink(missing_ok=True)
        layout.preserved_disk_lock.unlink(missing_ok=True)

    def _layout(self, location: AttemptLocation) -> AttemptLayout:
        return TaskLayout(self._data_dir, location.task_id).attempt(location.attempt_id)


def has_disk(layout: AttemptLayout) -> bool:
    """Return whether an attempt has a disk, as a directory or as an image."""
    return layout.disk.exists() or layout.disk_image.exists()


def has_disk_or_handle(layout: AttemptLayout) -> bool:
    """Return whether an attempt has a disk or a handle."""
    return layout.handle.exists() or has_disk(layout)


def _list_attempts(data_dir: Path, failures: list[str]) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield each attempt's id, its task's id, and whether it has files other than its log. Read errors are collected.

    Uses strings instead of paths for speed: most attempts ended long ago and left nothing.
    """
    layout = TaskLayout(data_dir, "")
    root, attempts, log = str(tasks_root(data_dir)), layout.attempts_root.name, layout.attempt("").runner_log.name
    for task_id in _list_names(root):
        try:
            for attempt_id in _list_names(f"{root}/{task_id}/{attempts}"):
                yield attempt_id, (task_id, _list_names(f"{root}/{task_id}/{attempts}/{attempt_id}") not in ([], [log]))
        except OSError as error:
            failures.append(f"the attempts of task {task_id}: {error}")


def _list_names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  (a hot path)
    except (FileNotFoundError, NotADirectoryError):
        return []
