"""Recovery at the server's start: waiting tasks, running tasks, tasks whose runner is gone, and unrecorded tasks."""

import contextlib
import logging
from contextlib import suppress
from pathlib import Path

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.file_layout import TaskLayout, tasks_root
from sandbox.interfaces.journal import Journals, ReplayState
from sandbox.interfaces.store import IndexDamagedError, IndexedTask, Store
from sandbox.model.errors import SandboxError
from sandbox.model.events import TaskFinished
from sandbox.model.task_id_format import is_task_id
from sandbox.model.task_state import TaskState
from sandbox.server.index_writer import update_index
from sandbox.server.parent_task_results import discard_inheritance, has_own_artifacts
from sandbox.server.placement_routing import Placements, attempt_location
from sandbox.server.tracked_task import NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask

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


_log = logging.getLogger(__name__)


def discard_unrecorded_tasks(data_dir: Path, journals: Journals, store: Store) -> None:
    """Remove the files and journals of tasks for which an earlier server died before it wrote the first record.

    Such a task was never acknowledged: its journal exists and is empty, and the task is not in the index. Call this
    function before the server accepts tasks. Raises StoreError.
    """
    try:
        names = [path.name for path in tasks_root(data_dir).iterdir() if is_task_id(path.name)]
    except FileNotFoundError:
        return
    accepted = frozenset(journals.task_ids()) | store.task_ids()
    for task_id in names:
        layout = TaskLayout(data_dir, task_id)
        if task_id in accepted:
            continue
        try:
            was_accepted = has_own_artifacts(layout)
        except OSError as error:
            _log.error("Task %s has no record, and its files cannot be listed (%s); check the disk", task_id, error)
            continue
        if was_accepted:
            # A backup contains zeros in place of a journal that could not be read. They look like an unfinished record.
            _log.error("Task %s has results, but its journal has no record; restore the journal from a backup", task_id)
            continue
        if layout.artifacts.is_dir() and _has_empty_journal(journals, task_id):
            discard_inheritance(layout)
            _log.info("Removed the files of task %s, which was never accepted", task_id)
        with suppress(OSError):  # the journal may be damaged
            if [path.name for path in layout.root.iterdir()] in ([], ["journal"]):
                journals.discard(task_id, journals.create(task_id))


def _has_empty_journal(journals: Journals, task_id: str) -> bool:
    """Return whether the journal exists and has no record. Returns False if the journal is missing or damaged."""
    try:
        return journals.replay(task_id).task is None
    except (SandboxError, OSError):
        return False
