"""Removes finished tasks that are kept no longer, whole: from the lists first, then from the disk.

A task that is not in the index any more and still has its journal is whole again with the next start of a server. Once
its directory has left `tasks/` by one rename, it is gone for good, and what is left of it only takes room.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sandbox.contracts.clock import Clock
from sandbox.contracts.disks import Remove
from sandbox.contracts.journal import Journals
from sandbox.contracts.layout import TaskLayout, pruned_root, tasks_root
from sandbox.contracts.retention import PrunedTask, Retention
from sandbox.contracts.store import Cursor, Indexed, Store, TaskQuery
from sandbox.control.preservation import Preservation
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.state import TaskState
from sandbox.model.task import Task

_FINISHED = frozenset(state for state in TaskState if state.is_terminal)
_DISK_BLOCK_BYTES = 512
_REMOVED_AT_ONCE = 500
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PruningRooms:
    """What pruning needs of the server. flush: brings a directory's entries to disk."""

    data_dir: Path
    journals: Journals
    store: Store
    preservation: Preservation
    clock: Clock
    remove: Remove
    flush: Callable[[Path], None]


class Need:
    """Says of finished tasks, the oldest first, whether they must go. Pure."""

    def __init__(self, retention: Retention, now: datetime, tasks_count: int, total_bytes: int) -> None:
        """tasks_count, total_bytes: of all that are finished."""
        self._retention = retention
        self._now = now
        self._tasks_count = tasks_count
        self._total_bytes = total_bytes

    def asks_for(self, finished_at: datetime) -> bool:
        """The next one has to go."""
        bounds = self._retention
        seconds, keep, max_bytes = bounds.older_than_seconds, bounds.keep, bounds.max_bytes
        is_too_old = seconds is not None and self._now - finished_at > timedelta(seconds=seconds)
        is_one_too_many = keep is not None and self._tasks_count > keep
        return is_too_old or is_one_too_many or (max_bytes is not None and self._total_bytes > max_bytes)

    def met_by(self, size_bytes: int) -> None:
        """It goes."""
        self._tasks_count -= 1
        self._total_bytes -= size_bytes


class Pruning:
    """One at a time. Never an unfinished task, nor one whose preserved sandbox is still there for its user."""

    def __init__(self, rooms: PruningRooms) -> None:
        self._rooms = rooms
        self._turn = asyncio.Lock()

    async def prune(self, retention: Retention, *, dry_run: bool = False) -> Sequence[PrunedTask]:
        """Remove what is to go; gives it, the oldest first. dry_run: only say so. Raises StoreError, OSError."""
        async with self._turn:
            pruned = [task async for task in self._choose(retention)]
            if dry_run:
                return pruned
            gone = [task for task in pruned if await asyncio.to_thread(self._take_away, task.id)]
            if gone:
                size_bytes = sum(task.size_bytes for task in gone)
                _log.info("Finished tasks that are kept no longer are gone: %d of %d bytes", len(gone), size_bytes)
            # What cannot be removed keeps no other task: they are set aside all the same.
            await self._remove_rest()
            return gone

    async def _choose(self, retention: Retention) -> AsyncIterator[PrunedTask]:
        counts = await asyncio.to_thread(self._rooms.store.count_by_state)
        total_bytes = await asyncio.to_thread(self._measure_finished) if retention.max_bytes is not None else 0
        finished_count = sum(counts[state] for state in _FINISHED)
        need = Need(retention, self._rooms.clock.now(), finished_count, total_bytes)
        place: Cursor | None = None
        while True:
            query = TaskQuery(_FINISHED, sort="state_changed_at", order="asc", cursor=place)
            page = await asyncio.to_thread(self._rooms.store.query, query)
            for task in page.tasks:
                if not need.asks_for(task.state_changed_at):
                    return
                if await asyncio.to_thread(self._rooms.preservation.is_kept, task):
                    continue
                size_bytes = await asyncio.to_thread(disk_bytes, TaskLayout(self._rooms.data_dir, task.id).root)
                need.met_by(size_bytes)
                yield _pruned(task, size_bytes)
            if page.next_cursor is None:
                return
            place = page.next_cursor

    def _measure_finished(self) -> int:
        unfinished = {indexed.task.id for indexed in self._rooms.store.unfinished()}
        root = tasks_root(self._rooms.data_dir)
        names = [path.name for path in root.iterdir()] if root.exists() else []
        return sum(disk_bytes(root / name) for name in names if name not in unfinished)

    def _take_away(self, task_id: str) -> bool:
        """Out of the lists and out of `tasks/`; whether it was possible now."""
        with self._rooms.journals.holding(task_id) as is_over:
            if not is_over and self._rooms.journals.is_held(task_id):
                return False
            indexed = self._rooms.store.load(task_id)
            if indexed is None or not indexed.task.state.is_terminal:
                return False
            if any(files.handle.exists() for files in TaskLayout(self._rooms.data_dir, task_id).attempts()):
                # Something of a sandbox is on the machine, and nothing else would tell whose it is.
                return False
            self._rooms.store.forget(task_id)
            try:
                self._set_aside(task_id)
            except OSError as error:
                if not TaskLayout(self._rooms.data_dir, task_id).root.exists():
                    return True  # only that it is gone is not on disk yet
                self._take_back(indexed, error)
                return False
            return True

    def _set_aside(self, task_id: str) -> None:
        rest = pruned_root(self._rooms.data_dir)
        rest.mkdir(mode=0o700, exist_ok=True)
        directory = TaskLayout(self._rooms.data_dir, task_id).root
        if directory.exists():
            directory.rename(rest / f"{task_id}.{secrets.token_hex(4)}")
            self._rooms.flush(directory.parent)

    def _take_back(self, indexed: Indexed, error: OSError) -> None:
        task_id = indexed.task.id
        _log.error("Task %s could not be pruned, and is kept: %s", task_id, error, extra={"task_id": task_id})
        self._rooms.store.save(indexed)

    async def _remove_rest(self) -> None:
        """What lies in `pruned/`, from now or from before a crash."""
        rest = pruned_root(self._rooms.data_dir)
        paths = await asyncio.to_thread(lambda: list(rest.iterdir()) if rest.exists() else [])
        for begin in range(0, len(paths), _REMOVED_AT_ONCE):
            async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                await self._rooms.remove(paths[begin : begin + _REMOVED_AT_ONCE])


def _pruned(task: Task, size_bytes: int) -> PrunedTask:
    return PrunedTask(task.id, task.state, task.state_changed_at, size_bytes)


def disk_bytes(directory: Path) -> int:
    """What everything below takes on its disk, links not followed; what goes meanwhile does not count."""
    total, waiting = 0, [os.fspath(directory)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * _DISK_BLOCK_BYTES
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError:
            continue
    return total
