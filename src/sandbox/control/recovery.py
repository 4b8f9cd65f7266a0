"""What a server finds when it starts: tasks that wait, tasks that go on, tasks whose runner is gone."""

import contextlib
import logging

from sandbox.contracts.clock import Clock
from sandbox.contracts.journal import Journals
from sandbox.contracts.recorder import Reading, Recorder, read_task
from sandbox.contracts.store import IndexDamagedError, Indexed, Store
from sandbox.control.feed import Feed
from sandbox.control.indexing import catch_up
from sandbox.model.errors import SandboxError
from sandbox.model.event import TaskFinished
from sandbox.model.state import TaskState

_log = logging.getLogger(__name__)


def recover(journals: Journals, store: Store, clock: Clock) -> list[Feed]:
    """Bring the index up to the journals; gives the unfinished tasks: those under way, then those that wait.

    A pending task's journal is taken back, so that the server can launch it. All others are followed: a living
    runner holds its journal, and the follower finds out about a dead one. A journal that cannot be read or taken
    costs nobody but its own task anything; where its row is damaged as well, the task is not found any more.
    """
    for task_id, reason in catch_up(journals, store).items():
        _log.error("Task %s cannot be taken into the index: %s", task_id, reason, extra={"task_id": task_id})
        _drop_damaged(store, task_id)
    feeds = [_feed(journals, clock, indexed) for indexed in store.unfinished()]
    return sorted(feeds, key=lambda feed: feed.recorder is not None)


def _drop_damaged(store: Store, task_id: str) -> None:
    """A damaged row tells nothing of its task."""
    try:
        store.load(task_id)
    except IndexDamagedError:
        store.forget(task_id)
        _log.error("Task %s is not in the index any more: its row is damaged", task_id, extra={"task_id": task_id})


def _feed(journals: Journals, clock: Clock, indexed: Indexed) -> Feed:
    if indexed.task.state is not TaskState.PENDING:
        return Feed(indexed)
    try:
        writer = journals.open(indexed.task.id)
    except (SandboxError, OSError):
        return Feed(indexed)
    try:
        reading = read_task(journals, indexed.task.id)
    except (SandboxError, OSError):
        reading = Reading(None, 0)
    if reading.task is None or reading.task.state is not TaskState.PENDING:
        writer.close()
        return Feed(indexed)
    recorder = Recorder(writer, reading.task, clock.now)
    if reading.task.cancel is not None or reading.task.failure is not None:
        # Where this fails, the launch tries again.
        with contextlib.suppress(OSError):
            recorder.record(TaskFinished())
            writer.close()
            return Feed(indexed)
    return Feed(Indexed(reading.task, reading.offset), recorder)
