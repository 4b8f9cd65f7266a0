"""Records an attempt's events, even with little or no disk space."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import datetime

from sandbox.interfaces.disks import DiskReserve
from sandbox.interfaces.journal import JournalWriter, Recorder
from sandbox.model import events as e
from sandbox.model.limits import JOURNAL_WRITE_RETRY_SECONDS, OUTPUT_SYNC_SECONDS
from sandbox.model.state_machine import Effect, StopAttempt
from sandbox.model.task import Task
from sandbox.runner.retrying_writer import HostDiskSpace, RetryingWriter, is_droppable

_DROPPED_MESSAGE = "Output is dropped: the disk of the server's data directory is nearly full."
_log = logging.getLogger(__name__)


class StopSignal:
    """Set by effects of recorded events, awaited by the running step."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    @property
    def is_forced(self) -> bool:
        """Whether to skip the grace period between TERM and KILL."""
        return self.forced.is_set()

    def apply_effect(self, effect: Effect) -> None:
        """Set the signal if the attempt must stop."""
        if isinstance(effect, StopAttempt):
            self.requested.set()
            if effect.force:
                self.forced.set()


class AttemptRecorder:
    """Records the events of an attempt's task.

    Below the watermark, output is dropped to leave space for state changes. One `gap` event reports this at once, and a
    later one reports how much was dropped. If the disk rejects a record, the reserve is released; if that does not
    help, records are buffered in order.

    writer, task, now, transform: see `Recorder`.
    stop_signal: set once a recorded event requires the attempt to stop, such as a cancel request.
    """

    def __init__(
        self,
        writer: JournalWriter,
        task: Task | None,
        now: Callable[[], datetime],
        disk_space: HostDiskSpace,
        reserve: DiskReserve,
        transform: Callable[[e.Event], e.Event] = lambda event: event,
    ) -> None:
        self.disk_space = disk_space
        self.stop_signal = StopSignal()
        self._writer = RetryingWriter(writer, reserve.release)
        self._recorder = Recorder(self._writer, task, now, on_effect=self.stop_signal.apply_effect, transform=transform)
        self._reserve = reserve
        self._recorded_hashes: set[int] = set()
        """Hashes use less memory than thousands of events with long paths."""
        self._should_keep_reserve = self._has_logged_reserve_failure = False
        self._is_dropping = False
        self._dropped_bytes = self._dropped_events = 0

    @property
    def task(self) -> Task:
        """The current task, including records that are not written yet."""
        return self._recorder.task

    def record(self, event: e.Event) -> None:
        """Record an event, now or once the disk accepts it.

        Raises IllegalEventError if the event is not allowed now, and OSError for a record that is too long or a cancel
        request that cannot be written now.
        """
        self._record_or_drop(event)

    def _record_or_drop(self, event: e.Event) -> bool:
        """Record an event or drop it; return whether it was recorded."""
        if self._is_dropping and (isinstance(event, e.AgentExited) or not self._is_blocked()):
            self._record_dropped()
        if isinstance(event, e.Output) and (self._is_dropping or self.disk_space.is_short()):
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
        """Like `record`, but only the first time for equal events: a retry finds the same problems again.

        subject: what the event is about, if the event itself does not say so.
        """
        key = hash((event, subject))
        if key not in self._recorded_hashes and self._record_or_drop(event):
            self._recorded_hashes.add(key)

    def allocate_reserve(self) -> None:
        """If available, reserve disk space for the end of the task, until `stop_keeping_reserve` is called."""
        self._should_keep_reserve = True
        self._allocate_reserve()

    def stop_keeping_reserve(self) -> None:
        """Stop keeping a reserve, because the task is ending.

        A released reserve is not allocated again, and an existing one is removed with the attempt's files.
        """
        self._should_keep_reserve = False

    def flush_pending(self) -> None:
        """Write pending records. Raises OSError if the disk still rejects them."""
        self._writer.flush_pending()
        if self._should_keep_reserve and not self._reserve.is_allocated and not self.disk_space.is_short():
            self._allocate_reserve()

    def sync(self) -> None:
        """Flush written records to disk; may run in a thread. Raises OSError."""
        self._writer.sync()

    async def wait_until_written(self) -> None:
        """Return once all records are written. Raises OSError after JOURNAL_WRITE_RETRY_SECONDS."""
        try:
            async with asyncio.timeout(JOURNAL_WRITE_RETRY_SECONDS):
                while self._writer.has_pending:
                    with contextlib.suppress(OSError):
                        self._writer.flush_pending()
                        return
                    await asyncio.sleep(OUTPUT_SYNC_SECONDS)
        except TimeoutError:
            raise OSError("The last records of the task could not be written") from None

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

    def _is_blocked(self) -> bool:
        return self._writer.has_pending or self.disk_space.is_short()

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
