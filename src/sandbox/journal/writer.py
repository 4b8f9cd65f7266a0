"""Writes a journal: locks it, applies the task's events to the state, appends records and flushes them to disk.

The journal lock makes its holder the only writer: `flock` on an open file description.
A process that inherits the descriptor also holds the lock. The kernel releases the lock when the last copy of the
descriptor is closed.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sandbox.interfaces.journal import JournalBusyError, JournalWriter
from sandbox.journal import record_format
from sandbox.journal.reader import JournalEnd
from sandbox.model import events as e
from sandbox.model.events import Event, Record, Transition
from sandbox.model.state_machine import Effect, IllegalEventError, advance
from sandbox.model.task import Task
from sandbox.primitives.files import fsync_path

_LOCK_TRIES = 5
_LOCK_PAUSE_SECONDS = 0.002


def acquire_lock(path: Path, *, create: bool = False) -> int:
    """Open (or create) and lock the file; return the descriptor. Raises JournalBusyError, FileNotFoundError."""
    lock_fd = _open_lock(path, os.O_CREAT if create else 0)
    try:
        _lock(lock_fd, path)
        if not is_lock_of(lock_fd, path):
            raise JournalBusyError(f"Another process has just removed {path.parent}; try again.")
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def adopt_lock(path: Path, lock_fd: int) -> None:
    """Check that an inherited descriptor is the lock of this journal, and make it non-inheritable.

    Raises OSError (EBADF) if it refers to another file, JournalBusyError if another process holds the lock.
    """
    if not is_lock_of(lock_fd, path):
        raise OSError(errno.EBADF, f"Descriptor {lock_fd} is not the lock of this journal", str(path))
    os.set_inheritable(lock_fd, False)
    _lock(lock_fd, path)


def is_lock_of(lock_fd: int, path: Path) -> bool:
    """Return whether a descriptor refers to the current file, not to one that was removed. Raises FileNotFoundError."""
    return os.path.samestat(os.fstat(lock_fd), path.stat())


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock now."""
    try:
        lock_fd = _open_lock(path)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(lock_fd, fcntl.LOCK_SH)
    finally:
        os.close(lock_fd)


def _open_lock(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | flags, 0o600)  # NFS needs write access for an exclusive lock


def _lock(lock_fd: int, path: Path) -> None:
    """Lock the file. Tries several times, because `is_locked` in another process may hold the lock briefly."""
    for _ in range(_LOCK_TRIES):
        if _try_lock(lock_fd, fcntl.LOCK_EX):
            return
        time.sleep(_LOCK_PAUSE_SECONDS)
    raise JournalBusyError(f"Another process is writing {path.parent}; wait until that process has ended.")


def _try_lock(lock_fd: int, kind: int) -> bool:
    try:
        fcntl.flock(lock_fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_REWRITE_CHUNK_BYTES = 8 * 1024 * 1024
"""Possibly lost data is rewritten and flushed in chunks of this size, which bounds the cost on a failing disk."""


class FileJournalWriter:
    """Appends records to a journal whose lock it holds. Not thread-safe, but `sync` may run in another thread."""

    def __init__(
        self, records_path: Path, lock_fd: int, journal_end: JournalEnd, new_directories: Sequence[Path] = ()
    ) -> None:
        """Continue after `journal_end` and drop the data after it. Takes ownership of `lock_fd` on success.

        new_directories: directories with entries that are not flushed yet, innermost first. They are flushed after the
            first record: a file system flushes all of these changes together.
        """
        self._new_directories = new_directories
        self._lock_fd = lock_fd
        self._records_path = records_path
        self._end = journal_end.end_offset
        self._last_seq = journal_end.last_record.seq if journal_end.last_record else 0
        self._epoch = journal_end.last_record.epoch + 1 if journal_end.last_record else 1
        self._has_torn_tail = records_path.stat().st_size > journal_end.end_offset
        # An earlier writer may have died before its records were flushed.
        self._is_dirty = journal_end.end_offset > 0
        self._flushed_end = 0
        self._possibly_lost_end = 0
        self._flush_lock = threading.Lock()
        self._is_handed_over = False
        self._records_fd = os.open(records_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            self._drop_torn_tail()
        except BaseException:
            os.close(self._records_fd)
            raise

    @property
    def last_seq(self) -> int:
        """Number of the last record, or 0 if there is no record."""
        return self._last_seq

    @property
    def lock_fd(self) -> int:
        """File descriptor of the lock. A child process inherits it only if it is passed explicitly."""
        return self._lock_fd

    def append(
        self, event: Event, transition: Transition | None = None, *, at: datetime, durable: bool = False
    ) -> Record:
        """Number and write an event; see `JournalWriter.append`."""
        self._check_not_handed_over()
        record = Record(self._last_seq + 1, self._epoch, at.astimezone(UTC), event, transition)
        line = record_format.encode(record)
        if len(line) > record_format.LINE_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, f"The record has {len(line)} bytes, more than {record_format.LINE_BYTES_MAX}")
        self._append_line(line, durable=durable)
        self._last_seq = record.seq
        return record

    def sync(self) -> None:
        """Flush the records appended since the last call."""
        if self._is_dirty:
            # Reset the flag before the flush: records that are appended during the flush may not be included in it.
            self._is_dirty = False
            self._flush()

    def close(self) -> None:
        """Flush and close. Unlike unlocking, closing leaves the lock to a child process that inherited it."""
        if self._lock_fd < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._records_fd)
            os.close(self._lock_fd)
            self._records_fd = self._lock_fd = -1

    @contextlib.contextmanager
    def hand_over(self) -> Iterator[int]:
        """Yield the descriptor of the lock for a process that inherits it and continues the journal.

        This writer then rejects records, and it cannot be handed over again, unless the block raises OSError. Raises
        JournalBusyError if it was already handed over: two processes that inherit the lock would both write.
        """
        self._check_not_handed_over()
        self._is_handed_over = True
        try:
            yield self._lock_fd
        except OSError:
            self._is_handed_over = False
            raise

    def _check_not_handed_over(self) -> None:
        if self._is_handed_over:
            raise JournalBusyError(
                f"{self._records_path.parent} was handed over to another process, which writes it now."
            )

    def _flush(self, appended_bytes: int = 0) -> None:
        """Flush to disk. After a failed flush, first rewrite the data, because the kernel has marked it as clean.

        The kernel reports such an error only once, so only one flush runs at a time.

        appended_bytes: size of the record that is being appended, if its append waits for this flush. Other flushes do
            not rewrite that record, because it may be cut off in the meantime.
        """
        with self._flush_lock:
            end = self._end + appended_bytes
            try:
                at = self._flushed_end
                while at < min(self._possibly_lost_end, end):
                    begin, at = at, min(at + _REWRITE_CHUNK_BYTES, end)
                    _rewrite(self._records_path, begin, at)
                    os.fdatasync(self._records_fd)
                    # Do not count the record that is being appended: it may be cut off if the last fdatasync fails.
                    self._flushed_end = min(at, self._end)
                os.fdatasync(self._records_fd)
                for directory in self._new_directories:
                    fsync_path(directory)
            except BaseException:
                self._is_dirty = True
                self._possibly_lost_end = os.fstat(self._records_fd).st_size
                raise
            self._flushed_end, self._new_directories = end, ()

    def _append_line(self, line: bytes, *, durable: bool) -> None:
        self._drop_torn_tail()
        self._has_torn_tail = True
        try:
            _write_all(self._records_fd, line)
            if durable:
                # A flush by another thread does not count: it may have started before this write.
                self._flush(len(line))
            else:
                self._is_dirty = True
        except BaseException:
            # If the incomplete line cannot be removed either, the next append tries again before it writes.
            with contextlib.suppress(OSError):
                self._drop_torn_tail()
            raise
        self._end += len(line)
        self._has_torn_tail = False

    def _drop_torn_tail(self) -> None:
        if self._has_torn_tail:
            os.ftruncate(self._records_fd, self._end)
            self._has_torn_tail = False
            self._is_dirty = True


def _rewrite(records_path: Path, begin: int, end: int) -> None:
    """Rewrite the same bytes in place, so that the kernel writes them to disk again."""
    with records_path.open("r+b", buffering=0) as file:
        data = memoryview(os.pread(file.fileno(), end - begin, begin))
        while data:
            written = os.pwrite(file.fileno(), data, begin)
            data, begin = data[written:], begin + written


def _write_all(records_fd: int, line: bytes) -> None:
    """Write a whole line. One write is usually enough, but the kernel may accept less when the disk is nearly full."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(records_fd, rest) :]


_DURABLE_EVENTS = (
    *(e.AttemptStarted, e.AgentStarted, e.AgentExited, e.AttemptFailed, e.AttemptTornDown, e.FollowUpSkipped),
    *(e.CancelRequested, e.ArtifactCollected, e.Usage),
)
"""Events that are flushed before `record` returns, even if they do not change the state."""


class JournalRecorder:
    """Records the events of one task. Implements `Recorder`. The arguments are those of `Journals.recorder`."""

    def __init__(
        self,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        *,
        on_effect: Callable[[Effect], None] = lambda _: None,
        transform: Callable[[Event], Event] = lambda event: event,
    ) -> None:
        self.writer = writer
        self._on_effect = on_effect
        self._transform = transform
        self._task = task
        self._now = now

    @property
    def task(self) -> Task:
        """The current task."""
        if self._task is None:
            raise IllegalEventError("The journal has no record yet.")
        return self._task

    def record(self, event: Event) -> Record:
        """Write one event, after `transform`; see `Recorder.record`."""
        event, at = self._transform(event), self._now()
        result = advance(self._task, event, seq=self.writer.last_seq + 1, at=at)
        durable = result.transition is not None or isinstance(event, _DURABLE_EVENTS)
        record = self.writer.append(event, result.transition, at=at, durable=durable)
        self._task = result.task
        for effect in result.effects:
            self._on_effect(effect)
        return record
