"""Records submissions, each exactly once."""

import logging
from datetime import timedelta

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalDamagedError, Journals, Recorder, replay_task
from sandbox.interfaces.store import DuplicateTaskError, IndexedTask, Store, StoreError
from sandbox.interfaces.tasks import IdempotencyKeyReusedError, UnavailableError
from sandbox.model.events import Idempotency, Record, TaskSubmitted
from sandbox.model.limits import IDEMPOTENCY_SECONDS
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import IllegalEventError, advance
from sandbox.model.task import Task
from sandbox.server.tracked_task import TrackedTask

_log = logging.getLogger(__name__)


class SubmissionLog:
    """Writes the journal first, then the index; after a crash the index is rebuilt from the journal.

    Blocks on the disk.
    """

    def __init__(self, journals: Journals, store: Store, clock: Clock) -> None:
        self._journals = journals
        self._store = store
        self._clock = clock

    def find(self, idempotency: Idempotency, unfinished: list[Task]) -> Task | None:
        """Return the task that was submitted with this key, in its state at acceptance.

        unfinished: tasks to search as well, because the index may lack them. Raises IdempotencyKeyReusedError,
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
            submitted = TaskSubmitted(task.id, task.manifest, task.idempotency)
            return advance(None, submitted, seq=1, at=task.created_at).task
        return None

    def add(self, manifest: Manifest, idempotency: Idempotency | None) -> tuple[TrackedTask, Record]:
        """Create a task; return it and its record 1, which is on disk.

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
        recorder = Recorder(writer, None, self._clock.now)
        try:
            submission = recorder.record(TaskSubmitted(task_id, manifest, idempotency))
        except BaseException:
            self._journals.discard(task_id, writer)
            raise
        return TrackedTask(self._index(recorder.task), recorder), submission

    def _index(self, task: Task) -> IndexedTask:
        """Index a task. It is accepted already, so a failure is only logged, and the index is updated later."""
        indexed = IndexedTask(task, 0)
        try:
            indexed = IndexedTask(task, replay_task(self._journals, task.id).offset)
            self._store.insert(indexed)
        except (OSError, StoreError) as error:
            _log.error("Task %s is not in the index yet: %s", task.id, error, extra={"task_id": task.id})
        return indexed

    def _duplicate_error(self, task_id: str) -> Exception:
        try:
            existing = replay_task(self._journals, task_id).task
        except FileNotFoundError:
            existing = None
        except (JournalDamagedError, IllegalEventError) as error:
            return UnavailableError(f"The task {task_id} already exists, and cannot be read: {error.message}")
        return DuplicateTaskError(existing) if existing else UnavailableError(f"Task {task_id} is being submitted.")
