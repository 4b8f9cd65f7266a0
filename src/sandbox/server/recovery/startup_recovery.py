"""Recovery at the server's start: waiting tasks, running tasks, tasks whose runner is gone."""

import contextlib
import logging
from collections.abc import Collection, Iterable

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals, ReplayState
from sandbox.interfaces.store import IndexDamagedError, IndexedTask, Store
from sandbox.model.errors import SandboxError
from sandbox.model.events import TaskFinished
from sandbox.model.task_state import TaskState
from sandbox.server.placement_routing import Placements, attempt_location
from sandbox.server.tracked_task import NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask

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


_log = logging.getLogger(__name__)


def recover(journals: Journals, store: Store, placements: Placements, clock: Clock) -> list[TrackedTask]:
    """Update the index from the journals; return the unfinished tasks: running tasks first, then waiting tasks.

    The server acquires the journal of a pending task to launch it; if another process may hold it, the task
    has no known owner. All other tasks belong to the runner of their last attempt, and the tailer detects a dead
    runner. An unreadable or locked journal affects only its own task; if the index row is damaged as well, the task can
    no longer be found.
    """
    for task_id, reason in update_index(journals, store).items():
        _log.error("Task %s cannot be added to the index: %s", task_id, reason, extra={"task_id": task_id})
        _drop_damaged(store, task_id)
    tracked_tasks = [_track(journals, placements, clock, indexed) for indexed in store.unfinished()]
    return sorted(tracked_tasks, key=lambda tracked: isinstance(tracked.owner, ServerOwned))


def _drop_damaged(store: Store, task_id: str) -> None:
    """Remove the index row of a task if it is damaged."""
    try:
        store.load(task_id)
    except IndexDamagedError:
        store.delete(task_id)
        _log.error("Task %s was removed from the index: its row is damaged", task_id, extra={"task_id": task_id})


def _track(journals: Journals, placements: Placements, clock: Clock, indexed: IndexedTask) -> TrackedTask:
    task = indexed.task
    if task.attempt is not None:
        return TrackedTask(indexed, RunnerOwned(placements.find_runner(attempt_location(task, task.attempt))))
    return _acquire(journals, clock, indexed)


def _acquire(journals: Journals, clock: Clock, indexed: IndexedTask) -> TrackedTask:
    """Acquire the journal of a pending task, if it is free and the task is still waiting."""
    try:
        writer = journals.open(indexed.task.id)
    except (SandboxError, OSError):
        return TrackedTask(indexed, NoKnownOwner())
    try:
        replay_state = journals.replay(indexed.task.id)
    except (SandboxError, OSError):
        replay_state = ReplayState(None, 0)
    if replay_state.task is None or replay_state.task.state is not TaskState.PENDING:
        writer.close()
        return TrackedTask(indexed, NoKnownOwner())
    recorder = journals.recorder(writer, replay_state.task, clock.now)
    if replay_state.task.cancel is not None or replay_state.task.failure is not None:
        # If the end cannot be recorded here, the launcher records it later.
        with contextlib.suppress(OSError):
            recorder.record(TaskFinished())
            writer.close()
            return TrackedTask(indexed, NoKnownOwner())
    return TrackedTask(IndexedTask(replay_state.task, replay_state.offset), ServerOwned(recorder))
