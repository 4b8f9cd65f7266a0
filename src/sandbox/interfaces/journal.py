"""The journal of a task: append-only, one writer at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from enum import Enum, auto
from typing import Protocol

import msgspec

from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError
from sandbox.model.events import Event, Record, Transition
from sandbox.model.state_machine import Effect
from sandbox.model.task import Task


class LockState(Enum):
    """Whether a writer holds a lock.

    UNKNOWN: the writer's host is not responding. UNKNOWN must never be treated as FREE, because the writer may still
    write.
    """

    HELD = auto()
    FREE = auto()
    UNKNOWN = auto()


class JournalBusyError(SandboxError):
    """Another process holds, or may hold, the journal's lock, so the journal's writer may be alive."""

    code = "journal_busy"
    retryable = True


class JournalDamagedError(SandboxError):
    """The journal is damaged or incomplete, or contains invalid records."""

    code = "journal_damaged"


class JournalOffsetError(JournalDamagedError):
    """No record ends at the offset to continue from: the journal was replaced or truncated."""


class RecordBatch(msgspec.Struct, frozen=True):
    """Whole records read from a byte offset, and the offset after them."""

    records: Sequence[Record]
    next_offset: int


class JournalWriter(Protocol):
    """The only writer of a journal. It holds the journal's lock, which the kernel releases when the process dies."""

    @property
    def last_seq(self) -> int:
        """Number of the last record, 0 if there is none."""
        ...

    def append(
        self, event: Event, transition: Transition | None = None, *, at: datetime, durable: bool = False
    ) -> Record:
        """Assign the next number to an event that happened `at` (UTC), and write it. Readers see it immediately.

        With `durable`, the event is on disk on return. If it cannot be written, raises OSError and leaves the journal
        unchanged.
        """
        ...

    def sync(self) -> None:
        """Flush the records appended since the last call; cheap if there are none."""
        ...

    def close(self) -> None:
        """Flush, and release this process's hold on the lock."""
        ...


class Recorder(Protocol):
    """Records the events of one task: applies each event with `advance`, then writes it."""

    @property
    def writer(self) -> JournalWriter:
        """The writer of the task's journal."""
        ...

    @property
    def task(self) -> Task:
        """The current task. Raises IllegalEventError before record 1."""
        ...

    def record(self, event: Event) -> Record:
        """Write one event. If it changes the state or must be durable, it is on disk on return.

        Raises IllegalEventError if the event is not allowed now, OSError if it cannot be written. An error changes
        nothing.
        """
        ...


class ReplayState(msgspec.Struct, frozen=True):
    """A task computed from its journal up to a byte offset."""

    task: Task | None
    offset: int


WatchJournal = Callable[[str, Callable[[], None]], AbstractContextManager[bool]]
"""Calls a function in the event loop within a few milliseconds after each write to the journal of a task.

The watch stops when the context exits. Yields False if writes cannot be reported, so the journal must be polled.
"""


class Journals(Protocol):
    """All journals of one data directory."""

    @property
    def watch(self) -> WatchJournal:
        """Reports writes to a journal."""
        ...

    def create(self, task_id: str) -> JournalWriter:
        """Create a task's journal with epoch 1. Raises OSError, or FileExistsError if the task already has one."""
        ...

    def discard(self, task_id: str, writer: JournalWriter) -> None:
        """Remove a newly created journal whose record 1 could not be written, and release the lock.

        Raises OSError.
        """
        ...

    def open(self, task_id: str) -> JournalWriter:
        """Acquire the lock, drop a torn tail and start the next epoch.

        Raises JournalBusyError unless the lock is FREE; FileNotFoundError, JournalDamagedError.
        """
        ...

    def read(self, task_id: str, offset: int = 0, *, bytes_max: int = 1 << 20) -> RecordBatch:
        """Read whole records from `offset`, about `bytes_max` bytes (at least one record if there is one).

        An incomplete tail ends the batch without an error. Raises JournalOffsetError if no record ends at `offset`,
        JournalDamagedError, FileNotFoundError.
        """
        ...

    def replay(self, task_id: str, state: ReplayState | None = None) -> ReplayState:
        """Compute a task from its journal, from `state` (None: the start of the journal) to the current end.

        Raises JournalDamagedError, FileNotFoundError.
        """
        ...

    def recorder(
        self,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        *,
        on_effect: Callable[[Effect], None] = lambda _: None,
        transform: Callable[[Event], Event] = lambda event: event,
    ) -> Recorder:
        """Create a recorder.

        task: the task of the records so far; None before record 1.
        now: returns the UTC wall clock time, with time zone.
        on_effect: called with each effect of a written record.
        transform: changes each event before it is applied and written, for example to redact it.
        """
        ...

    def find_offset(self, task_id: str, seq: int) -> int:
        """Return the byte offset of record `seq`, or the end of the last record if there is no such record yet.

        Cheap regardless of the journal's length. Raises JournalDamagedError, FileNotFoundError.
        """
        ...

    def size_bytes(self, task_id: str) -> int:
        """Return the size in bytes, including an incomplete tail. Raises FileNotFoundError."""
        ...

    def try_lock(self, task_id: str) -> AbstractContextManager[bool]:
        """Hold the lock for the duration of the context, without reading records.

        Yields whether this process holds it: False if another process holds it or may hold it (HELD, UNKNOWN), or if
        the journal has no lock file. Raises OSError.
        """
        ...

    def compress(self, task_id: str) -> None:
        """Compress the journal of a finished task. It stays readable and is never written again.

        A compressed journal is left unchanged. Raises JournalDamagedError (also if the last record is not
        TaskFinished), JournalBusyError unless the lock is FREE, FileNotFoundError, OSError.
        """
        ...

    def lock_state(self, task_id: str) -> LockState:
        """Return whether a writer holds the lock now; FREE if the journal has no lock file. Raises OSError."""
        ...

    def task_ids(self) -> Sequence[str]:
        """Return the ids of the tasks whose journal has at least record 1."""
        ...


class ArtifactCopy(Protocol):
    """An artifact that is being stored. All methods except `publish` block."""

    def write(self, data: bytes) -> None:
        """Append content. Raises OSError, including after `close`."""
        ...

    def flush(self) -> None:
        """Check the size and the checksum, and flush the content to disk. Raises OSError."""
        ...

    def publish(self) -> None:
        """Give the flushed file its name, replacing an existing artifact. Does not block. Raises OSError."""
        ...

    def close(self) -> None:
        """Flush the name of a published artifact, or remove what was written. Idempotent. Raises OSError."""
        ...


class TaskReplicas(Protocol):
    """Copies of journals and artifacts that are written in other data directories.

    A placement whose runners are on other hosts uses it to copy journals and artifacts to the server's data directory,
    and to copy the records that precede an attempt to the data directories of those hosts. Repeating a call has no
    effect. Methods block.
    """

    def end_offset(self, task_id: str) -> int:
        """Return the byte offset after the last record of the copy; 0 if there is none. Raises JournalDamagedError."""
        ...

    def read(self, task_id: str, offset: int, bytes_max: int) -> bytes:
        """Return the bytes of whole records from `offset`, where a record begins. Raises FileNotFoundError, OSError.

        Returns at most `bytes_max` bytes. Use `Journals.read` to find a range that ends after a whole record.
        """
        ...

    def receive(self, task_id: str, offset: int, data: bytes) -> int:
        """Append the bytes of whole records that the original has at `offset`; return the offset after them.

        They are on disk on return. Raises JournalOffsetError if the copy is shorter than `offset`, or contains other
        bytes there because another writer has continued the journal. Raises JournalDamagedError if a record is invalid,
        JournalBusyError if this host has a writer; OSError.
        """
        ...

    def receive_untrusted(self, task_id: str, offset: int, data: bytes) -> int:
        """Append records that a runner on an untrusted host wrote; see `receive`.

        Also raises JournalDamagedError if a runner must not write one of the records now: the event is not allowed in
        the task's state, only a server records it, or the change of state or the epoch is wrong.
        """
        ...

    def read_task(self, task_id: str) -> Task | None:
        """Return the task that the copy describes; None if there is no copy. Raises JournalDamagedError, OSError."""
        ...

    def create_artifact(self, task_id: str, artifact: Artifact) -> ArtifactCopy:
        """Begin to store an artifact of a task that has a copy. Raises OSError.

        Publish the artifact before you call `receive` with the record that names it. Removes incomplete artifacts that
        earlier processes left behind.
        """
        ...

    def artifact_sizes(self, task_id: str) -> Mapping[str, int]:
        """Return the size of each stored artifact, keyed by name. Raises OSError."""
        ...
