"""A journal's writer that keeps what the disk does not take at the moment, and writes it once it does."""

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import MeasureSpace
from sandbox.interfaces.journal import JournalWriter
from sandbox.model import events as e
from sandbox.model.disk_space import Watermark
from sandbox.model.limits import KEPT_OUTPUT_BYTES_MAX, SPACE_CHECK_SECONDS

_log = logging.getLogger(__name__)
_RECORD_BYTES = 256
_CAN_BE_LEFT_OUT = (e.Output, e.Progress, e.Metrics, e.ToolCall, e.EgressDenied, e.Trouble)


class _Kept(NamedTuple):
    event: e.Event
    transition: e.Transition | None
    at: datetime
    durable: bool


class PatientWriter:
    """The contract's `JournalWriter`. Records stay in their order, and none gets its number twice.

    A wish to cancel is a promise to whoever made it, so it is written now or refused. Of what tells neither a state nor
    what was paid for only KEPT_OUTPUT_BYTES_MAX are kept. make_room: called when the disk refuses something; whether a
    try again is worth it.
    """

    def __init__(self, writer: JournalWriter, make_room: Callable[[], bool]) -> None:
        self._writer = writer
        self._make_room = make_room
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0

    @property
    def has_kept(self) -> bool:
        """Whether something is not written yet."""
        return bool(self._kept)

    @property
    def last_seq(self) -> int:
        """Number of the last record, the kept ones counted."""
        return self._writer.last_seq + len(self._kept)

    @property
    def lock_fd(self) -> int:
        """See `JournalWriter.lock_fd`."""
        return self._writer.lock_fd

    def append(
        self, event: e.Event, transition: e.Transition | None = None, *, at: datetime, durable: bool = False
    ) -> e.Record:
        """Write an event now or later. Raises OSError for one that is neither; nothing changed then."""
        waiting = _Kept(event, transition, at, durable)
        if isinstance(event, e.CancelRequested):
            self.catch_up()
            return self._write(waiting)
        if not self._kept:
            try:
                return self._write(waiting)
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise
                _log.warning("The disk does not take what happens to the task: %s; it is tried again.", error)
                self._refuse(event, error)
        else:
            self._refuse(event, None)
        self._kept.append(waiting)
        self._kept_bytes += _size_bytes(event)
        return e.Record(self.last_seq, 0, at, event, transition)

    def catch_up(self) -> None:
        """Write what is kept. Raises OSError where the disk still does not take it."""
        while self._kept:
            self._write(self._kept[0])
            self._kept_bytes -= _size_bytes(self._kept.popleft().event)

    def sync(self) -> None:
        """See `JournalWriter.sync`."""
        self._writer.sync()

    def close(self) -> None:
        """See `JournalWriter.close`."""
        self._writer.close()

    def _refuse(self, event: e.Event, error: OSError | None) -> None:
        if can_be_left_out(event) and self._kept_bytes + _size_bytes(event) > KEPT_OUTPUT_BYTES_MAX:
            raise error or OSError("Too much waits to be written already")

    def _write(self, waiting: _Kept) -> e.Record:
        try:
            return self._append(waiting)
        except OSError:
            if not self._make_room():
                raise
        return self._append(waiting)

    def _append(self, waiting: _Kept) -> e.Record:
        return self._writer.append(waiting.event, waiting.transition, at=waiting.at, durable=waiting.durable)


def can_be_left_out(event: e.Event) -> bool:
    """Whether the task is what it is without this event."""
    return isinstance(event, _CAN_BE_LEFT_OUT)


def _size_bytes(event: e.Event) -> int:
    return _RECORD_BYTES + (len(event.data) if isinstance(event, e.Output) else 0)


class HostSpace:
    """Looks when it is asked, and at most every SPACE_CHECK_SECONDS. What cannot be measured is as it was."""

    def __init__(self, measure: MeasureSpace, watermark: Watermark, clock: Clock) -> None:
        self._measure = measure
        self._watermark = watermark
        self._clock = clock
        self._is_short = False
        self._looks_at = float("-inf")

    def is_short(self) -> bool:
        """There is less than the watermark, or was until now and it is not clearly more yet."""
        now = self._clock.monotonic()
        if now >= self._looks_at:
            self._looks_at = now + SPACE_CHECK_SECONDS
            with contextlib.suppress(OSError):
                self._is_short = self._watermark.is_short(self._measure(), was_short=self._is_short)
        return self._is_short

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether so much is free now, or cannot be measured. For any thread."""
        try:
            return self._measure().free_bytes >= size_bytes
        except OSError:
            return True
