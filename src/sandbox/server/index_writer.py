"""Writes tasks to the index, many in one transaction: after each change, and from the journals."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextvars import Context
from functools import partial
from typing import NamedTuple

from sandbox.interfaces.journal import Journals
from sandbox.interfaces.store import IndexedTask, Store
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import INDEX_INTERVAL_SECONDS

_log = logging.getLogger(__name__)


class _Write(NamedTuple):
    """A task to write, and whether it was written."""

    indexed: IndexedTask
    written: asyncio.Future[None]


class IndexWriter:
    """Writes the states of each task in order. Each transaction is flushed to disk, so concurrent calls share one.

    Its methods are called in the event loop.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next: list[_Write] = []
        self._later: dict[str, IndexedTask] = {}
        self._delayed: dict[str, IndexedTask] = {}
        """Tasks of `save_later` that are being written and for which there is no newer write, keyed by id."""

        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

    async def save(self, indexed: IndexedTask) -> None:
        """Replace or add a task; return once it is on disk. Raises StoreError."""
        for older in (self._later, self._delayed):
            older.pop(indexed.task.id, None)
        await self._enqueue(indexed)

    def save_later(self, indexed: IndexedTask) -> None:
        """Replace or add a task within INDEX_INTERVAL_SECONDS. A failure is logged, and the write is retried."""
        self._later[indexed.task.id] = indexed
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                INDEX_INTERVAL_SECONDS, self._save_pending, context=Context()
            )

    async def close(self) -> None:
        """Stop writing. After a restart, the server adds the missing data to the index from the journals."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    def _enqueue(self, indexed: IndexedTask) -> asyncio.Future[None]:
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next.append(_Write(indexed, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_batches(), context=Context())
        return written

    def _save_pending(self) -> None:
        pending, self._later, self._timer = self._later, {}, None
        self._delayed.update(pending)
        for indexed in pending.values():
            self._enqueue(indexed).add_done_callback(partial(self._finish_delayed_write, indexed))

    def _finish_delayed_write(self, indexed: IndexedTask, written: asyncio.Future[None]) -> None:
        is_newest = self._delayed.get(indexed.task.id) is indexed
        if is_newest:
            del self._delayed[indexed.task.id]
        if not written.cancelled() and (error := written.exception()) is not None:
            _log.error("Task %s is not up to date in the index: %s", indexed.task.id, error)
            if is_newest and indexed.task.id not in self._later:
                self.save_later(indexed)

    async def _write_batches(self) -> None:
        while self._next:
            batch, self._next = self._next, []
            await self._write(batch)

    async def _write(self, batch: list[_Write]) -> None:
        """Write the tasks in one transaction; if that fails, one by one, because each may be the cause."""
        try:
            await asyncio.to_thread(self._store.save_all, [each.indexed for each in batch])
        except Exception as error:
            if len(batch) == 1:
                _complete(batch[0].written, error)
                return
            for each in batch:
                await self._write([each])
            return
        for each in batch:
            _complete(each.written)


def _complete(written: asyncio.Future[None], error: Exception | None = None) -> None:
    if written.done():  # the caller was cancelled
        return
    if error is None:
        written.set_result(None)
    else:
        written.set_exception(error)


_BATCH_SIZE = 200


def update_index(journals: Journals, store: Store) -> dict[str, str]:
    """Index tasks that the store lacks or that another version indexed. Return the result of `index_journals`."""
    unknown, outdated = set(journals.task_ids()) - store.task_ids(), frozenset(store.outdated_task_ids())
    return index_journals(journals, store, sorted(unknown | outdated), previously_indexed=outdated)


def index_journals(
    journals: Journals, store: Store, task_ids: Iterable[str], *, previously_indexed: Collection[str] = ()
) -> dict[str, str]:
    """Index the current journals of these tasks. Return why tasks could not be indexed, keyed by task id.

    The rows of such tasks in the store are left unchanged. previously_indexed: for these tasks, a journal without a
    task is an error. For others, the journal is left over from a crash before the submission was acknowledged. Raises
    StoreError.
    """
    skipped: dict[str, str] = {}
    indexed: list[IndexedTask] = []
    for task_id in task_ids:
        try:
            indexed += _read_indexed(journals, task_id, is_indexed=task_id in previously_indexed)
        except (SandboxError, OSError) as error:
            skipped[task_id] = str(error)
        if len(indexed) >= _BATCH_SIZE:
            store.save_all(indexed)
            indexed.clear()
    store.save_all(indexed)
    return skipped


def _read_indexed(journals: Journals, task_id: str, *, is_indexed: bool) -> list[IndexedTask]:
    replay_state = journals.replay(task_id)
    if replay_state.task is None:
        if is_indexed:
            raise OSError(f"The journal of {task_id} contains no task; restore the journal from a backup.")
        return []
    if replay_state.task.id != task_id:
        raise OSError(
            f"The journal in the directory of {task_id} belongs to task {replay_state.task.id}; move the journal back."
        )
    return [IndexedTask(replay_state.task, replay_state.offset)]
