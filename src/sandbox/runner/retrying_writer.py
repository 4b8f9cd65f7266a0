"""A journal writer that buffers records while the disk rejects them."""

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import MeasureDiskSpace
from sandbox.interfaces.journal import JournalWriter
from sandbox.model import events as e
from sandbox.model.disk_space import Watermark
from sandbox.model.limits import BUFFERED_OUTPUT_BYTES_MAX, DISK_SPACE_CHECK_SECONDS

_log = logging.getLogger(__name__)
_RECORD_OVERHEAD_BYTES = 256
_DROPPABLE_EVENTS = (e.Output, e.Progress, e.Metrics, e.ToolCall, e.EgressDenied, e.ErrorReported)


class _PendingRecord(NamedTuple):
    event: e.Event
    transition: e.Transition | None
    at: datetime
    durable: bool


class RetryingWriter:
    """Implements `JournalWriter`. Records stay in order, and no sequence number is used twice.

    A cancel request is written at once or rejected, because its caller relies on it. Records that contain neither a
    state nor a cost are buffered only up to BUFFERED_OUTPUT_BYTES_MAX.

    free_space: called when the disk rejects a write; returns whether to try again.
    """

    def __init__(self, writer: JournalWriter, free_space: Callable[[], bool]) -> None:
        self._writer = writer
        self._free_space = free_space
        self._pending: deque[_PendingRecord] = deque()
        self._pending_bytes = 0

    @property
    def has_pending(self) -> bool:
        """Whether records are not written yet."""
        return bool(self._pending)

    @property
    def last_seq(self) -> int:
        """Number of the last record, including buffered ones."""
        return self._writer.last_seq + len(self._pending)

    @property
    def lock_fd(self) -> int:
        """See `JournalWriter.lock_fd`."""
        return self._writer.lock_fd

    def append(
        self, event: e.Event, transition: e.Transition | None = None, *, at: datetime, durable: bool = False
    ) -> e.Record:
        """Write or buffer an event. Raises OSError, and changes nothing, if neither is possible."""
        waiting = _PendingRecord(event, transition, at, durable)
        if isinstance(event, e.CancelRequested):
            self.flush_pending()
            return self._write(waiting)
        if not self._pending:
            try:
                return self._write(waiting)
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise
                _log.warning("Events of the task cannot be written to disk: %s; retrying.", error)
                self._check_pending_limit(event, error)
        else:
            self._check_pending_limit(event, None)
        self._pending.append(waiting)
        self._pending_bytes += _size_bytes(event)
        return e.Record(self.last_seq, 0, at, event, transition)

    def flush_pending(self) -> None:
        """Write the buffered records. Raises OSError if the disk still rejects them."""
        while self._pending:
            self._write(self._pending[0])
            self._pending_bytes -= _size_bytes(self._pending.popleft().event)

    def sync(self) -> None:
        """See `JournalWriter.sync`."""
        self._writer.sync()

    def close(self) -> None:
        """See `JournalWriter.close`."""
        self._writer.close()

    def _check_pending_limit(self, event: e.Event, error: OSError | None) -> None:
        if is_droppable(event) and self._pending_bytes + _size_bytes(event) > BUFFERED_OUTPUT_BYTES_MAX:
            raise error or OSError("Too many events are waiting to be written")

    def _write(self, pending: _PendingRecord) -> e.Record:
        try:
            return self._append(pending)
        except OSError:
            if not self._free_space():
                raise
        return self._append(pending)

    def _append(self, pending: _PendingRecord) -> e.Record:
        return self._writer.append(pending.event, pending.transition, at=pending.at, durable=pending.durable)


def is_droppable(event: e.Event) -> bool:
    """Whether an event may be dropped without changing the task's state or cost."""
    return isinstance(event, _DROPPABLE_EVENTS)


def _size_bytes(event: e.Event) -> int:
    return _RECORD_OVERHEAD_BYTES + (len(event.data) if isinstance(event, e.Output) else 0)


class HostDiskSpace:
    """Measures free space on demand, at most every DISK_SPACE_CHECK_SECONDS. On failure the last result stays."""

    def __init__(self, measure: MeasureDiskSpace, watermark: Watermark, clock: Clock) -> None:
        self._measure = measure
        self._watermark = watermark
        self._clock = clock
        self._is_short = False
        self._next_check_at = float("-inf")

    def is_short(self) -> bool:
        """Whether less than the watermark is free, or was before and has not clearly recovered yet."""
        now = self._clock.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + DISK_SPACE_CHECK_SECONDS
            with contextlib.suppress(OSError):
                self._is_short = self._watermark.is_low(self._measure(), was_low=self._is_short)
        return self._is_short

    def has_space_for(self, size_bytes: int) -> bool:
        """Whether this much is free now, or cannot be measured. Thread-safe."""
        try:
            return self._measure().free_bytes >= size_bytes
        except OSError:
            return True
