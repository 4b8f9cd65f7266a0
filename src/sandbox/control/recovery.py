"""What a server finds when it starts: tasks that wait, tasks that go on, tasks whose runner is gone."""

from sandbox.contracts.clock import Clock
from sandbox.contracts.journal import JournalBusyError, JournalDamagedError, Journals
from sandbox.contracts.recorder import Recorder, read_task
from sandbox.contracts.store import Indexed, Store
from sandbox.control.feed import Feed
from sandbox.model.event import TaskFinished
from sandbox.model.state import TaskState


def recover(journals: Journals, store: Store, clock: Clock) -> list[Feed]:
    """Bring the index up to the journals; gives the unfinished tasks, oldest first.

    A pending task's journal is taken back, so that the server can launch it. All others are followed: a living
    runner holds its journal, and the follower finds out about a dead one.
    """
    for task_id in set(journals.task_ids()) - store.task_ids():
        _index(journals, store, task_id)
    return [_feed(journals, clock, indexed) for indexed in store.unfinished()]


def _index(journals: Journals, store: Store, task_id: str) -> None:
    try:
        reading = read_task(journals, task_id)
    except (JournalDamagedError, FileNotFoundError):
        return
    if reading.task is not None:
        store.save(Indexed(reading.task, reading.offset))


def _feed(journals: Journals, clock: Clock, indexed: Indexed) -> Feed:
    if indexed.task.state is not TaskState.PENDING:
        return Feed(indexed)
    try:
        writer = journals.open(indexed.task.id)
    except (JournalBusyError, JournalDamagedError, FileNotFoundError):
        return Feed(indexed)
    reading = read_task(journals, indexed.task.id)
    if reading.task is None or reading.task.state is not TaskState.PENDING:
        writer.close()
        return Feed(indexed)
    recorder = Recorder(writer, reading.task, clock.now)
    if reading.task.cancel is None:
        return Feed(Indexed(reading.task, reading.offset), recorder)
    recorder.record(TaskFinished())
    writer.close()
    return Feed(indexed)
