"""A journal's writer and the task that the journal tells, kept in step."""

from collections.abc import Callable, Iterator
from datetime import datetime

import msgspec

from sandbox.contracts.journal import Journals, JournalWriter
from sandbox.model import event as e
from sandbox.model.life import Effect, IllegalEventError, advance
from sandbox.model.task import Task

_DURABLE = (
    *(e.AttemptStarted, e.AgentStarted, e.AgentExited, e.AttemptFailed, e.AttemptEnded, e.FollowUpForgone),
    *(e.CancelRequested, e.ArtifactCollected, e.Usage),
)
"""Events that are on disk when `record` returns although they change no state."""


class Reading(msgspec.Struct, frozen=True):
    """The fold of a journal from some record on, and the byte offset that it reaches to."""

    task: Task | None
    offset: int


def read_records(journals: Journals, task_id: str, offset: int = 0) -> Iterator[e.Record]:
    """Every record from a byte offset to the present end. Raises JournalDamagedError, FileNotFoundError."""
    while (batch := journals.read(task_id, offset)).records:
        yield from batch.records
        offset = batch.next_offset


def read_task(journals: Journals, task_id: str, start: Reading | None = None) -> Reading:
    """Fold a journal from `start` to its present end. Raises JournalDamagedError, FileNotFoundError."""
    reading = start or Reading(None, 0)
    while (batch := journals.read(task_id, reading.offset)).records:
        task = reading.task
        for record in batch.records:
            task = advance(task, record.event, seq=record.seq, at=record.at).task
        reading = Reading(task, batch.next_offset)
    return reading


class Recorder:
    """Records what happens to one task; decides with `advance`, hands effects to whoever carries them out."""

    def __init__(self, writer: JournalWriter, task: Task | None, now: Callable[[], datetime]) -> None:
        self.writer = writer
        self.on_effect: Callable[[Effect], None] = lambda _: None
        self.revise: Callable[[e.Event], e.Event] = lambda event: event
        self._task = task
        self._now = now

    @property
    def task(self) -> Task:
        """The task as it stands now."""
        if self._task is None:
            raise IllegalEventError("The journal has no record yet.")
        return self._task

    def record(self, event: e.Event) -> e.Record:
        """Write one event, as `revise` leaves it. On disk on return where it changes the state or is a promise.

        Raises IllegalEventError when it cannot happen now, OSError when it cannot be written; nothing changed then.
        """
        event, at = self.revise(event), self._now()
        moved = advance(self._task, event, seq=self.writer.last_seq + 1, at=at)
        durable = moved.transition is not None or isinstance(event, _DURABLE)
        record = self.writer.append(event, moved.transition, at=at, durable=durable)
        self._task = moved.task
        for effect in moved.effects:
            self.on_effect(effect)
        return record
