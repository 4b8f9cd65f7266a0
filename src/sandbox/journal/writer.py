"""The one writer of a journal."""

import contextlib
import errno
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from sandbox.journal import record_format
from sandbox.journal.extent import Extent
from sandbox.model.events import Event, Record, Transition

_REWRITE_CHUNK_BYTES = 8 * 1024 * 1024
"""What may be lost is written again, and flushed, in pieces of this size: a disk that goes on failing costs no more."""


class FileJournalWriter:
    """Appends records to the file of a journal whose lock it holds. For one thread; `sync` may have another one."""

    def __init__(self, records: Path, lock_fd: int, extent: Extent) -> None:
        """Go on after `extent`, which drops what is behind it. Takes `lock_fd` over once it has succeeded."""
        self._lock_fd = lock_fd
        self._records = records
        self._end = extent.end
        self._last_seq = extent.last.seq if extent.last else 0
        self._epoch = extent.last.epoch + 1 if extent.last else 1
        self._has_torn_tail = records.stat().st_size > extent.end
        # Whoever wrote before may have died with records that are not on disk yet.
        self._is_dirty = extent.end > 0
        self._flushed_end = 0
        self._unconfirmed_end = 0
        self._flush_lock = threading.Lock()
        self._records_fd = os.open(records, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            self._drop_torn_tail()
        except BaseException:
            os.close(self._records_fd)
            raise

    @property
    def last_seq(self) -> int:
        """Number of the last record, 0 for none."""
        return self._last_seq

    @property
    def lock_fd(self) -> int:
        """File descriptor that carries the lock; not inherited unless it is passed on by its number."""
        return self._lock_fd

    def append(
        self, event: Event, transition: Transition | None = None, *, at: datetime, durable: bool = False
    ) -> Record:
        """Number and write an event; the contract's `JournalWriter.append`."""
        record = Record(self._last_seq + 1, self._epoch, at.astimezone(UTC), event, transition)
        text = record_format.encode(record)
        if len(text) > record_format.LINE_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, f"The record has {len(text)} bytes, more than {record_format.LINE_BYTES_MAX}")
        self._append_line(text, durable=durable)
        self._last_seq = record.seq
        return record

    def sync(self) -> None:
        """Flush to disk what was appended since the last time."""
        if self._is_dirty:
            # Before the flush, because what is appended during it may be too late for it.
            self._is_dirty = False
            self._flush()

    def close(self) -> None:
        """Flush and let go. Closing, unlike unlocking, leaves the lock to a child that inherited it."""
        if self._lock_fd < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._records_fd)
            os.close(self._lock_fd)
            self._records_fd = self._lock_fd = -1

    def _flush(self, appended_bytes: int = 0) -> None:
        """A flush that failed is not made good by another one: the kernel takes what it could not write for written.

        It says so once, and so there is one flush at a time. appended_bytes: behind the last record, of the one that
        waits for this; whoever flushes beside the writer leaves them alone, because they may be cut off meanwhile.
        """
        with self._flush_lock:
            end = self._end + appended_bytes
            try:
                at = self._flushed_end
                while at < min(self._unconfirmed_end, end):
                    begin, at = at, min(at + _REWRITE_CHUNK_BYTES, end)
                    _rewrite(self._records, begin, at)
                    os.fdatasync(self._records_fd)
                    # What waits for this flush may be cut off, should the one below fail.
                    self._flushed_end = min(at, self._end)
                os.fdatasync(self._records_fd)
            except BaseException:
                self._is_dirty = True
                self._unconfirmed_end = os.fstat(self._records_fd).st_size
                raise
            self._flushed_end = end

    def _append_line(self, text: bytes, *, durable: bool) -> None:
        self._drop_torn_tail()
        self._has_torn_tail = True
        try:
            _write_all(self._records_fd, text)
            if durable:
                # Whatever another thread has flushed: it may have begun before this was written.
                self._flush(len(text))
            else:
                self._is_dirty = True
        except BaseException:
            # Where even this fails, the next append tries again before it writes.
            with contextlib.suppress(OSError):
                self._drop_torn_tail()
            raise
        self._end += len(text)
        self._has_torn_tail = False

    def _drop_torn_tail(self) -> None:
        if self._has_torn_tail:
            os.ftruncate(self._records_fd, self._end)
            self._has_torn_tail = False
            self._is_dirty = True


def _rewrite(records: Path, begin: int, end: int) -> None:
    """The same bytes in the same place, so that the kernel has to write them to the disk once more."""
    with records.open("r+b", buffering=0) as file:
        data = memoryview(os.pread(file.fileno(), end - begin, begin))
        while data:
            written = os.pwrite(file.fileno(), data, begin)
            data, begin = data[written:], begin + written


def _write_all(records_fd: int, text: bytes) -> None:
    """One write for a whole line is the rule; the kernel may take less when the disk fills."""
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(records_fd, rest) :]
