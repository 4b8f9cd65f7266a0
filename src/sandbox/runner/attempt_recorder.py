"""Records an attempt's events: redacts them, writes them even if the disk is full, and applies their effects."""

import asyncio
import contextlib
import errno
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple, get_args

import msgspec

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import DiskReserve, MeasureDiskSpace
from sandbox.interfaces.journal import Journals, JournalWriter
from sandbox.interfaces.secrets import Redactor
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    AgentMessage,
    AgentStarted,
    ErrorReported,
    Event,
    Output,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.fixed_limits import (
    BUFFERED_OUTPUT_BYTES_MAX,
    DISK_SPACE_CHECK_INTERVAL_SECONDS,
    JOURNAL_WRITE_TIMEOUT_SECONDS,
    OUTPUT_SYNC_INTERVAL_SECONDS,
)
from sandbox.model.resources import Watermark
from sandbox.model.state_machine import Effect, StopAttempt
from sandbox.model.task import Task

_UNREDACTED_FIELDS: Mapping[type, frozenset[str]] = {
    WorkspacePrepared: frozenset({"base_commit"}),
    SandboxCreated: frozenset({"sandbox_name", "tier", "image"}),
    AgentStarted: frozenset({"session_id"}),
    AgentMessage: frozenset({"kind"}),
    Artifact: frozenset({"name", "content_type", "checksum"}),
    ErrorReported: frozenset({"error"}),
}
"""Codes, and names by which data is looked up. They are never redacted, even if a secret has such a value."""


def redact_event(event: Event, redactor: Redactor) -> Event:
    """Redact every string of an event. Output is redacted as a stream, before it becomes an event."""
    if isinstance(event, Output):
        return event
    redacted: Event = _redact_value(event, redactor)
    return redacted


def _redact_value(value: Any, redactor: Redactor) -> Any:
    """Redact `str` but none of its subclasses, such as enums, because Sandbox defines their values."""
    if type(value) is str:
        return redactor.redact_text(value)
    if isinstance(value, dict):
        return redactor.redact_json(value)
    if isinstance(value, tuple):
        return tuple(_redact_value(item, redactor) for item in value)
    if isinstance(value, msgspec.Struct):
        if isinstance(value, Artifact) and value.is_generated:
            return value
        redacted_fields = set(value.__struct_fields__) - _UNREDACTED_FIELDS.get(type(value), frozenset())
        return msgspec.structs.replace(
            value, **{name: _redact_value(getattr(value, name), redactor) for name in redacted_fields}
        )
    return value


_DROPPED_MESSAGE = "Output is dropped: the disk of the server's data directory is nearly full."
_log = logging.getLogger(__name__)
_RECORD_OVERHEAD_BYTES = 256
_OUTPUT_EVENTS = (e.Output, *get_args(e.ConversationEvent))
"""Events that contain text from the agent. They are dropped first if disk space is low."""

_DROPPABLE_EVENTS = (*_OUTPUT_EVENTS, e.Progress, e.Metrics, e.ToolCallEnded, e.EgressDenied, e.ErrorReported)


class _PendingRecord(NamedTuple):
    event: e.Event
    transition: e.Transition | None
    at: datetime
    durable: bool


class RetryingWriter:
    """Implements `JournalWriter`. Records stay in order, and no sequence number is used twice.

    A cancel request is written immediately or rejected, because its caller relies on it. Droppable events (see
    `is_droppable`) are buffered only up to BUFFERED_OUTPUT_BYTES_MAX.

    release_reserve: called when a write fails; frees the reserve of the disk, and returns whether to try again.
    needs_sync: whether some records may not have been flushed to disk. An earlier writer may have left such records.
    """

    def __init__(self, writer: JournalWriter, release_reserve: Callable[[], bool]) -> None:
        self.needs_sync = True
        self._writer = writer
        self._release_reserve = release_reserve
        self._pending: deque[_PendingRecord] = deque()
        self._pending_bytes = 0

    @property
    def has_pending(self) -> bool:
        """Whether there are buffered records."""
        return bool(self._pending)

    @property
    def last_seq(self) -> int:
        """Number of the last record, including buffered ones."""
        return self._writer.last_seq + len(self._pending)

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
        # Records that are appended during the flush may not be included in it.
        self.needs_sync = False
        try:
            self._writer.sync()
        except BaseException:
            self.needs_sync = True
            raise

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
            if not self._release_reserve():
                raise
        return self._append(pending)

    def _append(self, pending: _PendingRecord) -> e.Record:
        try:
            return self._writer.append(pending.event, pending.transition, at=pending.at, durable=pending.durable)
        finally:
            # Only after the write: a flush that began before it, in a thread, may not include the record.
            self.needs_sync = True


def is_droppable(event: e.Event) -> bool:
    """Return whether an event may be dropped without changing the task's state or cost."""
    return isinstance(event, _DROPPABLE_EVENTS)


def _size_bytes(event: e.Event) -> int:
    if isinstance(event, e.Output):
        return _RECORD_OVERHEAD_BYTES + len(event.data)
    text_bytes = len(msgspec.json.encode(event)) if isinstance(event, _OUTPUT_EVENTS) else 0
    return _RECORD_OVERHEAD_BYTES + text_bytes


class HostDiskSpace:
    """Compares the free space of the host's disk with the watermark, or with a size."""

    def __init__(self, measure: MeasureDiskSpace, watermark: Watermark, clock: Clock) -> None:
        self._measure = measure
        self._watermark = watermark
        self._clock = clock
        self._is_short = False
        self._next_check_at = float("-inf")

    def is_short(self) -> bool:
        """Return whether free space is below the watermark, with hysteresis (see `Watermark.is_low`).

        Measures at most once every DISK_SPACE_CHECK_INTERVAL_SECONDS. If this fails, returns the last result.
        """
        now = self._clock.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + DISK_SPACE_CHECK_INTERVAL_SECONDS
            with contextlib.suppress(OSError):
                self._is_short = self._watermark.is_low(self._measure(), was_low=self._is_short)
        return self._is_short

    def has_space_for(self, size_bytes: int) -> bool:
        """Return whether this much space is free now; True if the free space cannot be measured. Thread-safe."""
        try:
            return self._measure().free_bytes >= size_bytes
        except OSError:
            return True


class StopRequest:
    """The request to stop the attempt: the effects of recorded events make it, and the running step waits for it."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    @property
    def is_forced(self) -> bool:
        """Whether to skip the grace period between SIGTERM and SIGKILL."""
        return self.forced.is_set()

    def apply_effect(self, effect: Effect) -> None:
        """Make the request if the attempt must stop."""
        if isinstance(effect, StopAttempt):
            self.requested.set()
            if effect.force:
                self.forced.set()


class AttemptRecorder:
    """Records the events of an attempt's task.

    Below the watermark, output is dropped to leave space for state changes. One `gap` event reports this immediately,
    and a later one reports how much was dropped. If the disk rejects a record, the reserve is released; if that does
    not help, records are buffered in order.

    writer, task, now, transform: see `Journals.recorder`.
    stop_request: made once a recorded event, such as a cancel request, requires the attempt to stop. The event may have
    been recorded during an earlier attempt.
    """

    def __init__(
        self,
        journals: Journals,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        disk_space: HostDiskSpace,
        reserve: DiskReserve,
        transform: Callable[[e.Event], e.Event] = lambda event: event,
    ) -> None:
        self._disk_space = disk_space
        self.stop_request = StopRequest()
        self._writer = RetryingWriter(writer, reserve.release)
        if task is not None and task.cancel is not None:
            self.stop_request.apply_effect(StopAttempt(force=task.cancel.force))
        self._recorder = journals.recorder(
            self._writer, task, now, on_effect=self.stop_request.apply_effect, transform=transform
        )
        self._reserve = reserve
        self._recorded_hashes: set[int] = set()
        """Hashes of events, which use less memory than thousands of events with long paths."""
        self._should_keep_reserve = self._has_logged_reserve_failure = False
        self._is_dropping = False
        self._has_flush_work = asyncio.Event()
        self._dropped_bytes = self._dropped_events = 0

    @property
    def task(self) -> Task:
        """The current task, including records that are not written yet."""
        return self._recorder.task

    def record(self, event: e.Event) -> None:
        """Record an event, now or once the disk accepts it.

        Raises IllegalEventError if the event is not allowed now. Raises OSError for a cancel request that cannot be
        written now, and for a record that is too long, unless its event is droppable.
        """
        self._record_or_drop(event)

    def _record_or_drop(self, event: e.Event) -> bool:
        """Record an event or drop it; return whether it was recorded."""
        self._has_flush_work.set()
        if self._is_dropping and (isinstance(event, e.AgentExited) or not self._is_blocked()):
            self._record_dropped()
        if isinstance(event, _OUTPUT_EVENTS) and (self._is_dropping or self._disk_space.is_short()):
            self._drop(event)
            return False
        try:
            self._recorder.record(event)
        except OSError:
            if not is_droppable(event):
                raise
            self._drop(event)
            return False
        return True

    def record_once(self, event: e.AttemptFailed | e.ErrorReported, subject: str = "") -> None:
        """Record an event unless an equal one was already recorded: a retry finds the same problems again.

        subject: distinguishes events whose fields are equal, such as errors of files whose paths are hidden.
        """
        key = hash((event, subject))
        if key not in self._recorded_hashes and self._record_or_drop(event):
            self._recorded_hashes.add(key)

    def allocate_reserve(self) -> None:
        """Reserve disk space, if available, for the end of the task, until `stop_reallocating_reserve` is called."""
        self._should_keep_reserve = True
        self._allocate_reserve()
        self._has_flush_work.set()  # the reserve may have to be allocated again

    def stop_reallocating_reserve(self) -> None:
        """Stop keeping a reserve, because the task is ending.

        A released reserve is not allocated again, and an existing one is removed with the attempt's files.
        """
        self._should_keep_reserve = False

    def flush_pending(self) -> None:
        """Write pending records. Raises OSError if the disk still rejects them."""
        self._writer.flush_pending()
        if self._should_keep_reserve and not self._reserve.is_allocated and not self._disk_space.is_short():
            self._allocate_reserve()

    def sync(self) -> None:
        """Flush written records to disk; may run in a thread. Raises OSError."""
        self._writer.sync()

    async def wait_until_written(self) -> None:
        """Return once all records are written. Raises OSError after JOURNAL_WRITE_TIMEOUT_SECONDS."""
        try:
            async with asyncio.timeout(JOURNAL_WRITE_TIMEOUT_SECONDS):
                while self._writer.has_pending:
                    with contextlib.suppress(OSError):
                        self._writer.flush_pending()
                        return
                    await asyncio.sleep(OUTPUT_SYNC_INTERVAL_SECONDS)
        except TimeoutError:
            raise OSError("The last records of the task could not be written") from None

    @contextlib.asynccontextmanager
    async def flushing_periodically(self) -> AsyncIterator[None]:
        """Flush records periodically while the block runs; at its end, wait until all are written. Raises OSError."""
        flush_task = asyncio.create_task(self._flush_periodically())
        try:
            yield
            await self.wait_until_written()
        finally:
            flush_task.cancel()

    async def _flush_periodically(self) -> None:
        logged = ""
        while True:
            if not self._must_flush():
                self._has_flush_work.clear()
                await self._has_flush_work.wait()
            await asyncio.sleep(OUTPUT_SYNC_INTERVAL_SECONDS)
            try:
                self.flush_pending()
                await asyncio.to_thread(self.sync)
            except OSError as error:
                if str(error) != logged:
                    _log.error("Output could not be flushed: %s; retrying.", error)
                logged = str(error)

    def close(self) -> None:
        """Close the journal. Raises OSError."""
        self._writer.close()

    def _allocate_reserve(self) -> None:
        """Allocate the reserve. If that fails, log the reason once and continue without a reserve."""
        try:
            self._reserve.allocate()
        except OSError as error:
            if not self._has_logged_reserve_failure:
                _log.warning("Disk space for the end of the task could not be reserved: %s", error)
            self._has_logged_reserve_failure = True

    def _must_flush(self) -> bool:
        """Return whether something is left to flush, to write or to reserve, even if no other event is recorded."""
        lacks_reserve = self._should_keep_reserve and not self._reserve.is_allocated
        return self._writer.needs_sync or self._writer.has_pending or lacks_reserve

    def _is_blocked(self) -> bool:
        return self._writer.has_pending or self._disk_space.is_short()

    def _drop(self, event: e.Event) -> None:
        self._dropped_events += 1
        if isinstance(event, e.Output):
            self._dropped_bytes += len(event.data)
        if not self._is_dropping:
            self._is_dropping = True
            self._recorder.record(e.Gap(0, 0, _DROPPED_MESSAGE))

    def _record_dropped(self) -> None:
        message = f"{self._dropped_bytes} bytes of output in {self._dropped_events} events were dropped"
        self._is_dropping, self._dropped_bytes, self._dropped_events = False, 0, 0
        self._recorder.record(e.Gap(0, 0, f"{message}: the disk of the server's data directory was nearly full."))
