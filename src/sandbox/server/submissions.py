"""Accepts tasks, records each submission exactly once, and starts tracking the tasks."""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from datetime import timedelta
from pathlib import Path

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalDamagedError, Journals
from sandbox.interfaces.server_services import (
    IdempotencyKeyReusedError,
    Inheritance,
    Submission,
    TaskNotFoundError,
    TaskQueries,
    UnavailableError,
)
from sandbox.interfaces.store import DuplicateTaskError, IndexedTask, Store, StoreError
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model import events as e
from sandbox.model.events import Idempotency, Record, TaskSubmitted
from sandbox.model.fixed_limits import IDEMPOTENCY_SECONDS
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import IllegalEventError, advance
from sandbox.model.task import Task
from sandbox.primitives.concurrency import KeyedLock
from sandbox.server.derived_tasks import discard_inheritance, store_inheritance
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.start_conditions import StartConditions
from sandbox.server.tracked_task import ServerOwned, TrackedTask, TrackedTasks

_log = logging.getLogger(__name__)
_SHUTTING_DOWN_MESSAGE = "The server is shutting down; submit the task again later."


class SubmissionStore:
    """Finds submissions, and writes new submissions to journals. Performs blocking disk I/O."""

    def __init__(self, data_dir: Path, journals: Journals, store: Store, clock: Clock) -> None:
        self._data_dir = data_dir
        self._journals = journals
        self._store = store
        self._clock = clock

    def find(self, idempotency: Idempotency, unfinished: list[Task]) -> Task | None:
        """Return the task that was submitted with this key, in its state at acceptance.

        unfinished: tasks to search too, because they may be missing from the index. Raises IdempotencyKeyReusedError,
            StoreError.
        """
        since = self._clock.now() - timedelta(seconds=IDEMPOTENCY_SECONDS)
        indexed = self._store.find_by_idempotency_key(idempotency.key, since)
        candidates = [*unfinished, indexed.task] if indexed is not None else unfinished
        for task in candidates:
            if task.idempotency is None or task.idempotency.key != idempotency.key or task.created_at < since:
                continue
            if task.idempotency.body_sha256 != idempotency.body_sha256:
                raise IdempotencyKeyReusedError
            submitted = TaskSubmitted(task.id, task.manifest, task.idempotency, task.parent, task.rerun_of)
            return advance(None, submitted, seq=1, at=task.created_at).task
        return None

    def add(
        self,
        manifest: Manifest,
        idempotency: Idempotency | None,
        inheritance: Inheritance | None = None,
        rerun_of: str | None = None,
    ) -> tuple[TrackedTask, Record]:
        """Create a task; return it and its record 1. Files that the task takes over are written before the record.

        Raises DuplicateTaskError, UnavailableError, StoreError, OSError.
        """
        task_id = manifest.metadata.id
        existing = self._store.load(task_id)
        if existing is not None:
            raise DuplicateTaskError(existing.task)
        try:
            writer = self._journals.create(task_id)
        except FileExistsError:
            raise self._duplicate_error(task_id) from None
        recorder = self._journals.recorder(writer, None, self._clock.now)
        layout, parent = TaskLayout(self._data_dir, task_id), None
        try:
            if inheritance is not None:
                parent = inheritance.parent
                store_inheritance(layout, inheritance)
            submission = recorder.record(TaskSubmitted(task_id, manifest, idempotency, parent, rerun_of))
        except BaseException:
            if inheritance is not None:
                discard_inheritance(layout)
            self._journals.discard(task_id, writer)
            raise
        return TrackedTask(IndexedTask(recorder.task, self._find_end(task_id)), ServerOwned(recorder)), submission

    def _find_end(self, task_id: str) -> int:
        """Return the offset of a new journal's end, or 0 if it cannot be read: the task is accepted in any case."""
        try:
            return self._journals.size_bytes(task_id)
        except OSError:
            return 0

    def _duplicate_error(self, task_id: str) -> Exception:
        try:
            existing = self._journals.replay(task_id).task
        except FileNotFoundError:
            existing = None
        except (JournalDamagedError, IllegalEventError) as error:
            return UnavailableError(f"Task {task_id} already exists, but cannot be read: {error.message}")
        return DuplicateTaskError(existing) if existing else UnavailableError(f"Task {task_id} is being submitted.")


class TaskTracker:
    """Tracks unfinished tasks: the dispatcher launches them, and the tailer follows their journals.

    tracked_tasks: the tasks, keyed by id. Other components only read this mapping.
    """

    def __init__(self, tracked_tasks: TrackedTasks, dispatcher: Dispatcher, journal_tailer: JournalTailer) -> None:
        self.tracked_tasks = tracked_tasks
        self._dispatcher = dispatcher
        self._journal_tailer = journal_tailer

    def track(self, *tracked_tasks: TrackedTask, submission: e.Record | None = None) -> None:
        """Start tracking tasks that are in the journal and the store. Pending tasks are queued.

        submission: record 1 of a new task, which is published to subscribers.
        """
        for tracked in tracked_tasks:
            self._dispatcher.add(tracked)
            self._journal_tailer.start(tracked, submission)
        self._dispatcher.dispatch()

    def dispatch(self) -> None:
        """Launch the tasks that fit now that resources of the host have become free."""
        self._dispatcher.dispatch()

    async def close(self) -> None:
        """Wait for running launches, then stop following journals and release the journals' locks. Tasks continue."""
        await self._dispatcher.close()
        await self._journal_tailer.close()
        for tracked in self.tracked_tasks.values():
            if isinstance(tracked.owner, ServerOwned):
                with contextlib.suppress(OSError):
                    tracked.owner.recorder.writer.close()


class Submissions:
    """Implements `interfaces.server_services.Submissions`: refuses unacceptable tasks, and tracks the rest.

    A task is written to its journal first, then to the index, which is rebuilt from the journals after a crash.
    """

    def __init__(
        self,
        submission_store: SubmissionStore,
        queries: TaskQueries,
        tracker: TaskTracker,
        dispatcher: Dispatcher,
        conditions: StartConditions,
        index_writer: IndexWriter,
    ) -> None:
        self._submission_store = submission_store
        self._index_writer = index_writer
        self._queries = queries
        self._tracker = tracker
        self._dispatcher = dispatcher
        self._conditions = conditions
        self._idempotency_locks = KeyedLock()

    async def find_submission(self, idempotency: Idempotency) -> Submission | None:
        """See `interfaces.server_services.Submissions.find_submission`."""
        if self._dispatcher.is_closing:
            raise UnavailableError(_SHUTTING_DOWN_MESSAGE)
        unfinished = [tracked.task for tracked in self._tracker.tracked_tasks.values()]
        try:
            previous = await asyncio.to_thread(self._submission_store.find, idempotency, unfinished)
        except StoreError as error:
            raise UnavailableError(error.message) from error
        return None if previous is None else Submission(previous, is_replayed=True)

    async def submit(
        self,
        manifest: Manifest,
        idempotency: Idempotency | None = None,
        inheritance: Inheritance | None = None,
        rerun_of: str | None = None,
    ) -> Submission:
        """See `interfaces.server_services.Submissions.submit`."""
        if idempotency is None:
            return Submission(await self._accept(manifest, None, inheritance, rerun_of))
        async with self._idempotency_locks.lock_for(idempotency.key):
            previous = await self.find_submission(idempotency)
            return previous or Submission(await self._accept(manifest, idempotency, inheritance, rerun_of))

    async def check_acceptance(self, manifest: Manifest) -> None:
        """See `interfaces.server_services.Submissions.check_acceptance`."""
        self._check_acceptable(manifest)
        with self._dispatcher.reserved_unfinished_task_slot(manifest):
            pass
        if manifest.metadata.id:
            with contextlib.suppress(TaskNotFoundError):
                raise DuplicateTaskError(await self._queries.status(manifest.metadata.id))

    async def _accept(
        self,
        manifest: Manifest,
        idempotency: Idempotency | None,
        inheritance: Inheritance | None,
        rerun_of: str | None,
    ) -> Task:
        self._check_acceptable(manifest)
        if inheritance is not None and (reason := next(self._conditions.blocking_reasons(), None)) is not None:
            # The conversation that the task takes over needs disk space.
            raise UnavailableError(reason)
        task_id = manifest.metadata.id or str(uuid.uuid4())
        metadata = dataclasses.replace(manifest.metadata, id=task_id)
        named = manifest.replace(metadata=metadata)
        with self._dispatcher.reserved_unfinished_task_slot(named):
            try:
                tracked, submission = await asyncio.to_thread(
                    self._submission_store.add, named, idempotency, inheritance, rerun_of
                )
            except (OSError, StoreError) as error:
                if inheritance is not None:
                    # Raises TaskNotFoundError if the files are missing because their task was deleted in the meantime.
                    await self._queries.status(rerun_of or inheritance.parent.task_id)
                raise UnavailableError(f"The task could not be stored: {error}; submit it again.") from error
            submitted = tracked.task
            await self._index(IndexedTask(submitted, tracked.offset))
            _log.info("Task %s was accepted", submitted.id, extra={"task_id": submitted.id, "state": submitted.state})
            self._tracker.track(tracked, submission=submission)
        return submitted

    async def _index(self, indexed: IndexedTask) -> None:
        """Index a task that is already accepted. A failure is only logged, because the index is updated later."""
        try:
            await self._index_writer.save(indexed)
        except (OSError, StoreError) as error:
            task_id = indexed.task.id
            _log.error("Task %s is not in the index yet: %s", task_id, error, extra={"task_id": task_id})

    def _check_acceptable(self, manifest: Manifest) -> None:
        if self._dispatcher.is_closing:
            raise UnavailableError(_SHUTTING_DOWN_MESSAGE)
        self._conditions.check_acceptance(manifest)
        self._dispatcher.check_capacity(manifest)
