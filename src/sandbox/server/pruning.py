"""Removes finished tasks, on request or beyond the retention limits: first from the index, then from the disk."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.journal import Journals, LockState
from sandbox.interfaces.placement import HostUnreachableError
from sandbox.interfaces.server_services import PrunedTask, PruneResult, Retention, TaskNotFoundError, UnavailableError
from sandbox.interfaces.store import Cursor, IndexDamagedError, IndexedTask, Store, TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout, pruned_root
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import (
    DELETION_TIMEOUT_SECONDS,
    SANDBOX_TEARDOWN_SECONDS,
    UNUSED_DISK_MEASUREMENT_SECONDS_MAX,
)
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.primitives import fair_client_shares
from sandbox.primitives.concurrency import SingleFlight, run_in_daemon_thread
from sandbox.primitives.files import fsync_path
from sandbox.server.preserved_sandboxes import PRESERVED_STATES, PreservedFiles

_DISK_BLOCK_BYTES = 512
_REMOVE_BATCH_SIZE = 500
_REASONS_SHOWN_MAX = 5
_POLL_SECONDS = 0.1
_Skipped = dict[str, OSError | IndexDamagedError]
"""Why tasks could not be examined, keyed by task id. Such tasks are kept."""
_log = logging.getLogger(__name__)


class PruneSelector:
    """Decides, oldest task first, whether a finished task must be removed. Performs no I/O."""

    def __init__(self, retention: Retention, now: datetime, tasks_count: int, total_bytes: int) -> None:
        """tasks_count, total_bytes: number and total size of all finished tasks that may be removed."""
        self._retention = retention
        self._now = now
        self._tasks_count = tasks_count
        self._total_bytes = total_bytes

    def should_prune(self, finished_at: datetime) -> bool:
        """Return whether the next task must be removed."""
        bounds = self._retention
        seconds, keep, max_bytes = bounds.older_than_seconds, bounds.keep, bounds.max_bytes
        is_too_old = seconds is not None and self._now - finished_at > timedelta(seconds=seconds)
        exceeds_count = keep is not None and self._tasks_count > keep
        return is_too_old or exceeds_count or (max_bytes is not None and self._total_bytes > max_bytes)

    def record_pruned(self, size_bytes: int) -> None:
        """Count a removed task."""
        self._tasks_count -= 1
        self._total_bytes -= size_bytes


class Pruner:
    """Runs at most one pruning at a time. Never removes unfinished tasks or tasks with a preserved sandbox."""

    def __init__(
        self,
        data_dir: Path,
        journals: Journals,
        store: Store,
        preserved_files: PreservedFiles,
        clock: Clock,
        remove: RemovePaths,
    ) -> None:
        self._data_dir = data_dir
        self._journals = journals
        self._store = store
        self._preserved_files = preserved_files
        self._clock = clock
        self._remove_paths = remove
        self._lock = asyncio.Lock()
        self._size_measurement = SingleFlight(self._measure_sizes, UNUSED_DISK_MEASUREMENT_SECONDS_MAX)

    def prepare(self) -> None:
        """Create the directory for pruned tasks early, because it cannot be created on a full disk."""
        with contextlib.suppress(OSError):
            self._make_directory()

    async def prune(self, retention: Retention, *, dry_run: bool = False) -> PruneResult:
        """Remove the tasks that exceed the retention limits, and return them. dry_run: remove nothing.

        Only `max_bytes` needs a size measurement. The measurement may take longer than the caller waits; then the next
        call uses its result. A task that cannot be examined is kept and does not stop the others. Raises StoreError,
        OSError; without `dry_run`, UnavailableError at the end if such tasks remain, or if parts of others could not be
        removed.
        """
        skipped: _Skipped = {}
        pruned, failure = await self._prune_selected(self._select(retention, skipped), skipped, dry_run=dry_run)
        if retention.max_bytes is not None:
            measured, unmeasured = await self._size_measurement.result()
            skipped |= unmeasured
            selected = self._select_by_size(measured, pruned, retention.max_bytes)
            more, failure = await self._prune_selected(selected, skipped, dry_run=dry_run)
            pruned += more
        if not dry_run and (skipped or failure):
            raise UnavailableError(
                f"Finished tasks removed: {len(pruned)}. {self._describe_incomplete(skipped, failure)}"
            )
        return PruneResult(pruned, {task_id: _describe_skip(error) for task_id, error in skipped.items()})

    async def delete(self, task: Task) -> str:
        """Remove one finished task. Returns the reason why some of its files remain in `pruned/`; empty if none do.

        Waits for a process that still uses the task, such as a runner that is exiting. Raises TaskNotFoundError if the
        task is already removed, UnavailableError if it is still in use, StoreError, OSError.
        """
        pruned = PrunedTask(task.id, task.manifest.metadata.name, task.state, task.state_changed_at, 0)
        deadline = self._clock.monotonic() + DELETION_TIMEOUT_SECONDS
        while not await asyncio.to_thread(self._detach, pruned):
            if await asyncio.to_thread(self._store.load, task.id) is None:
                raise TaskNotFoundError(task.id)
            if self._clock.monotonic() > deadline:
                raise UnavailableError(
                    f"Task {task.id} is still in use, or parts of its sandbox remain; try again in five minutes, "
                    "and see the server's log."
                )
            await asyncio.sleep(_POLL_SECONDS)
        _log.info("Deleted task %s", task.id, extra={"task_id": task.id})
        async with self._lock:
            return await self._remove_detached()

    def _describe_incomplete(self, skipped: _Skipped, failure: str) -> str:
        reasons = []
        if skipped:
            details = "; ".join(
                f"{task_id}: {_skip_reason(error)}" for task_id, error in list(skipped.items())[:_REASONS_SHOWN_MAX]
            )
            advice = "; ".join(dict.fromkeys(map(_skip_remedy, skipped.values())))
            reasons.append(f"Kept, because they could not be checked: {len(skipped)} ({details}); {advice}.")
        if failure:
            directory = pruned_root(self._data_dir)
            rest = f"Removed tasks still use disk space in {directory}: {failure}"
            reasons.append(f"{rest}; fix the cause, and try again.")
        return " ".join(reasons)

    async def _prune_selected(
        self, selected: AsyncIterator[PrunedTask], skipped: _Skipped, *, dry_run: bool
    ) -> tuple[list[PrunedTask], str]:
        """Return the pruned tasks, and why files remain in `pruned/` (empty if none do)."""
        if dry_run:  # without the lock, so that it delays no deletion
            async with fair_client_shares.thread_slot():
                return [task async for task in selected], ""
        async with self._lock:
            return await self._detach_all(selected, skipped), await self._remove_detached()

    async def _detach_all(self, selected: AsyncIterator[PrunedTask], skipped: _Skipped) -> list[PrunedTask]:
        pruned = []
        async for task in selected:
            try:
                if await asyncio.to_thread(self._detach, task):
                    pruned.append(task)
            except (OSError, IndexDamagedError) as error:
                skipped[task.id] = error
        if pruned:
            size_bytes = sum(task.size_bytes for task in pruned)
            _log.info("Removed expired tasks: %d, with %d bytes in total", len(pruned), size_bytes)
        return pruned

    async def _select(self, retention: Retention, skipped: _Skipped) -> AsyncIterator[PrunedTask]:
        """Select tasks by age and number."""
        tasks_count = (
            0 if retention.keep is None else await asyncio.to_thread(self._count_prunable, retention.keep, skipped)
        )
        selector = PruneSelector(replace(retention, max_bytes=None), self._clock.now(), tasks_count, 0)
        cursor: Cursor | None = None
        while True:
            page = await asyncio.to_thread(
                self._store.query, TaskQuery.least_recently_changed_first(FINAL_STATES, cursor)
            )
            skipped |= page.damaged
            for task in page.tasks:
                if not selector.should_prune(task.state_changed_at):
                    return
                if await asyncio.to_thread(self._is_preserved, task, skipped):
                    continue
                pruned = await run_in_daemon_thread(partial(self._measure_task, task))
                selector.record_pruned(pruned.size_bytes)
                yield pruned
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    async def _select_by_size(
        self, measured: Sequence[PrunedTask], pruned: Sequence[PrunedTask], max_bytes: int
    ) -> AsyncIterator[PrunedTask]:
        """Select tasks by total size. pruned: tasks that were, or would have been, removed since the measurement."""
        task_ids = (await asyncio.to_thread(self._store.task_ids)).difference(task.id for task in pruned)
        left = [task for task in measured if task.id in task_ids]
        total_bytes = sum(task.size_bytes for task in left)
        selector = PruneSelector(Retention(max_bytes=max_bytes), self._clock.now(), len(left), total_bytes)
        for task in left:
            if not selector.should_prune(task.finished_at):
                return
            selector.record_pruned(task.size_bytes)
            yield task

    def _count_prunable(self, limit: int, skipped: _Skipped) -> int:
        """Count the finished tasks that may be removed.

        If no more than `limit` tasks are finished, return the number of all finished tasks.
        """
        counts = self._store.count_by_state()
        finished_count = sum(counts[state] for state in FINAL_STATES)
        if finished_count <= limit:
            return finished_count
        return finished_count - sum(
            self._is_preserved(task, skipped) for task in self._iterate_tasks(PRESERVED_STATES, skipped)
        )

    def _is_preserved(self, task: Task, skipped: _Skipped) -> bool:
        """Return whether the task has preserved files. If that is unknown, the task is kept and added to `skipped`."""
        try:
            return self._preserved_files.is_preserved(task)
        except OSError as error:
            skipped[task.id] = error
            return True

    def _measure_sizes(self) -> tuple[Sequence[PrunedTask], _Skipped]:
        """Measure the finished tasks that may be removed, oldest first."""
        skipped: _Skipped = {}
        tasks = self._iterate_tasks(FINAL_STATES, skipped)
        measured = [self._measure_task(task) for task in tasks if not self._is_preserved(task, skipped)]
        return measured, skipped

    def _iterate_tasks(self, states: frozenset[TaskState], skipped: _Skipped) -> Iterator[Task]:
        cursor: Cursor | None = None
        while True:
            page = self._store.query(TaskQuery.least_recently_changed_first(states, cursor))
            skipped |= page.damaged
            yield from page.tasks
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    def _measure_task(self, task: Task) -> PrunedTask:
        size_bytes = disk_usage_bytes(TaskLayout(self._data_dir, task.id).root)
        return PrunedTask(task.id, task.manifest.metadata.name, task.state, task.state_changed_at, size_bytes)

    def _detach(self, pruned: PrunedTask) -> bool:
        """Delete a task from the index, and move its directory out of `tasks/`.

        Return False if the task must wait, is no longer in the index, or could not be moved.
        """
        task_id = pruned.id
        with self._journals.try_lock(task_id) as has_lock:
            if not has_lock and self._journals.lock_state(task_id) is not LockState.FREE:
                return False
            indexed = self._store.load(task_id)
            if indexed is None or indexed.task.finished_at != pruned.finished_at:
                return False
            if self._preserved_files.has_sandbox_handle(indexed.task):
                return False
            self._store.delete(task_id)
            try:
                self._move_aside(task_id)
            except OSError as error:
                if not TaskLayout(self._data_dir, task_id).root.exists():
                    return True  # removed, but not flushed to disk yet
                self._restore_index_row(indexed, error)
                return False
            return True

    def _move_aside(self, task_id: str) -> None:
        pruned_directory = self._make_directory()
        directory = TaskLayout(self._data_dir, task_id).root
        if directory.exists():
            directory.rename(pruned_directory / f"{task_id}.{secrets.token_hex(4)}")
            fsync_path(directory.parent)

    def _make_directory(self) -> Path:
        directory = pruned_root(self._data_dir)
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def _restore_index_row(self, indexed: IndexedTask, error: OSError) -> None:
        task_id = indexed.task.id
        _log.error("Task %s could not be pruned, and is kept: %s", task_id, error, extra={"task_id": task_id})
        self._store.save(indexed)

    async def _remove_detached(self) -> str:
        """Remove everything in `pruned/`, including what was left there before a crash.

        If something could not be removed, return the last reason; otherwise return an empty string.
        """
        directory = pruned_root(self._data_dir)
        failure = ""
        try:
            paths = await asyncio.to_thread(lambda: list(directory.iterdir()) if directory.exists() else [])
        except OSError as error:
            return error_reason(error)
        for begin in range(0, len(paths), _REMOVE_BATCH_SIZE):
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await self._remove_paths(paths[begin : begin + _REMOVE_BATCH_SIZE])
            except TimeoutError as error:
                return error_reason(error)
            except OSError as error:
                failure = error_reason(error)
        return failure


def _describe_skip(error: OSError | IndexDamagedError) -> str:
    return f"{_skip_reason(error)}; {_skip_remedy(error)}"


def _skip_reason(error: OSError | IndexDamagedError) -> str:
    if isinstance(error, IndexDamagedError):
        return f"its entry in the index is damaged ({error.reason})"
    return error_reason(error)


def _skip_remedy(error: OSError | IndexDamagedError) -> str:
    return error.remedy if isinstance(error, IndexDamagedError | HostUnreachableError) else "check the disk"


def disk_usage_bytes(directory: Path) -> int:
    """Return the disk usage of a tree without following links.

    Files that vanish during the scan, and directories that cannot be read, are not counted.
    """
    total, waiting = 0, [os.fspath(directory)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * _DISK_BLOCK_BYTES
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return total
