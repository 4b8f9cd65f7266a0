"""The journal of a task: append-only, one writer at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

import msgspec

from sandbox.model import events as e
from sandbox.model.errors import SandboxError
from sandbox.model.events import Event, Record, Transition
from sandbox.model.state_machine import Effect, IllegalEventError, advance
from sandbox.model.task import Task


class JournalBusyError(SandboxError):
    """Somebody else holds the journal's lock, so somebody is alive and writing."""

    code = "journal_busy"
    retryable = True


class JournalDamagedError(SandboxError):
    """A record in the middle of the journal does not match its checksum."""

    code = "journal_damaged"


class JournalOffsetError(JournalDamagedError):
    """No record ends at the place from which somebody wanted to go on: the journal is not the one that it was."""


class RecordBatch(msgspec.Struct, frozen=True):
    """Whole records read from a byte offset on, and the offset after them."""

    records: Sequence[Record]
    next_offset: int


class JournalWriter(Protocol):
    """The one writer. Holding it is holding the lock; the kernel gives the lock back when the process dies."""

    @property
    def last_seq(self) -> int:
        """Number of the last record, 0 for none."""
        ...

    @property
    def lock_fd(self) -> int:
        """File descriptor that carries the lock; a child process that inherits it holds the lock too."""
        ...

    def append(
        self, event: Event, transition: Transition | None = None, *, at: datetime, durable: bool = False
    ) -> Record:
        """Number and write an event that happened `at` (UTC).

        Visible to readers at once; on disk on return if `durable`.

        Raises OSError; then the journal is as it was before.
        """
        ...

    def sync(self) -> None:
        """Flush to disk what was appended since the last time; cheap when there is nothing."""
        ...

    def close(self) -> None:
        """Flush, and give this process's hold of the lock back."""
        ...


class Journals(Protocol):
    """All journals below one data directory."""

    def create(self, task_id: str) -> JournalWriter:
        """Begin a task's journal, epoch 1. Raises FileExistsError when the task has one, OSError."""
        ...

    def discard(self, task_id: str, writer: JournalWriter) -> None:
        """Remove what `create` made, as record 1 could not be written, and give the lock back. Raises OSError."""
        ...

    def open(self, task_id: str) -> JournalWriter:
        """Take the lock, drop a torn tail, go on with the next epoch. Raises JournalBusyError, FileNotFoundError."""
        ...

    def adopt(self, task_id: str, lock_fd: int) -> JournalWriter:
        """As `open`, with the lock that this process was handed as an inherited descriptor."""
        ...

    def read(self, task_id: str, offset: int = 0, *, bytes_max: int = 1 << 20) -> RecordBatch:
        """Whole records from `offset`, about `bytes_max` bytes of them (at least one where there is one).

        Stops without error before a tail that is not whole yet. Raises PlaceLostError where no record ends at
        `offset`, JournalDamagedError, FileNotFoundError.
        """
        ...

    def find_offset(self, task_id: str, seq: int) -> int:
        """The byte offset at which record `seq` begins, or after the last record when there is none so far on.

        Costs little however long the journal is. Raises JournalDamagedError, FileNotFoundError.
        """
        ...

    def size_bytes(self, task_id: str) -> int:
        """Bytes that there are, a tail that is not whole included. Raises FileNotFoundError."""
        ...

    def try_lock(self, task_id: str) -> AbstractContextManager[bool]:
        """Take the lock, without a look at the records, for as long as the context lasts; False when it is not free."""
        ...

    def kill_lock_holder(self, task_id: str) -> bool:
        """KILL the runner that holds the lock, so that the lock comes free; whether there was one. Blocks."""
        ...

    def compress(self, task_id: str) -> None:
        """Compress the journal of a task that is finished: it can be read as before, and never written again.

        One that is packed already stays so. Raises JournalDamagedError also where its last record is not the end,
        JournalBusyError, FileNotFoundError, OSError.
        """
        ...

    def is_locked(self, task_id: str) -> bool:
        """Somebody holds the lock at this moment."""
        ...

    def task_ids(self) -> Sequence[str]:
        """The tasks that have a journal with at least record 1."""
        ...


_DURABLE_EVENTS = (
    *(e.AttemptStarted, e.AgentStarted, e.AgentExited, e.AttemptFailed, e.AttemptEnded, e.RetrySkipped),
    *(e.CancelRequested, e.ArtifactCollected, e.Usage),
)
"""Events that are on disk when `record` returns although they change no state."""


class ReplayState(msgspec.Struct, frozen=True):
    """The fold of a journal from some record on, and the byte offset that it reaches to."""

    task: Task | None
    offset: int


def read_records(journals: Journals, task_id: str, offset: int = 0) -> Iterator[e.Record]:
    """Every record from a byte offset to the present end. Raises JournalDamagedError, FileNotFoundError."""
    while (batch := journals.read(task_id, offset)).records:
        yield from batch.records
        offset = batch.next_offset


def replay_task(journals: Journals, task_id: str, state: ReplayState | None = None) -> ReplayState:
    """Fold a journal from `start` to its present end. Raises JournalDamagedError, FileNotFoundError."""
    reading = state or ReplayState(None, 0)
    while (batch := journals.read(task_id, reading.offset)).records:
        task = reading.task
        for record in batch.records:
            task = advance(task, record.event, seq=record.seq, at=record.at).task
        reading = ReplayState(task, batch.next_offset)
    return reading


class Recorder:
    """Records what happens to one task; decides with `advance`, hands effects to whoever carries them out."""

    def __init__(self, writer: JournalWriter, task: Task | None, now: Callable[[], datetime]) -> None:
        self.writer = writer
        self.on_effect: Callable[[Effect], None] = lambda _: None
        self.transform: Callable[[e.Event], e.Event] = lambda event: event
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
        event, at = self.transform(event), self._now()
        result = advance(self._task, event, seq=self.writer.last_seq + 1, at=at)
        durable = result.transition is not None or isinstance(event, _DURABLE_EVENTS)
        record = self.writer.append(event, result.transition, at=at, durable=durable)
        self._task = result.task
        for effect in result.effects:
            self.on_effect(effect)
        return record
