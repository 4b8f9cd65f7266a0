"""The server's in-memory state of one unfinished task."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from sandbox.interfaces.journal import Journals, LockState, Recorder, ReplayState
from sandbox.interfaces.runner import RunnerHandle
from sandbox.interfaces.store import IndexedTask, StoreError
from sandbox.model.fixed_limits import FINISHER_BACKOFF_FACTOR, FINISHER_BACKOFF_SECONDS, FINISHERS_MAX
from sandbox.model.task import Task

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerOwned:
    """The server holds the journal until the task is launched. The caller of the recorder must hold `write_lock`."""

    recorder: Recorder


@dataclass(frozen=True, slots=True)
class RunnerOwned:
    """The journal was passed to a runner. Only `runner.lock_state` shows whether the runner still holds it."""

    runner: RunnerHandle


@dataclass(frozen=True, slots=True)
class NoKnownOwner:
    """No process that writes the journal is known.

    No runner was started, the last runner has died, another process has the journal open, or the task has ended.
    """


JournalOwner = ServerOwned | RunnerOwned | NoKnownOwner
"""Who writes a task's journal."""


class FinisherHistory:
    """The finishers that this server launched for a task's last attempt."""

    def __init__(self) -> None:
        self._count = 0
        self._launched_at = 0.0
        self._has_reported_leftovers = False

    @property
    def is_exhausted(self) -> bool:
        """Whether no further finisher is launched."""
        return self._count >= FINISHERS_MAX

    @property
    def has_reported_leftovers(self) -> bool:
        """Whether an error about leftovers of the task is recorded."""
        return self._has_reported_leftovers

    def record_launch(self, monotonic: float) -> None:
        """Count a launched finisher."""
        self._count += 1
        self._launched_at = monotonic

    def record_leftovers_report(self) -> None:
        """Remember that the error about leftovers was recorded."""
        self._has_reported_leftovers = True

    def reset(self) -> None:
        """Reset the count, because another attempt was started."""
        self._count = 0

    def is_backoff_over(self, monotonic: float) -> bool:
        """Return whether the pause after the last finisher's launch has passed.

        By then, the cause of that finisher's death may be gone.

        Always true before the first finisher and after the last one.
        """
        if not 0 < self._count < FINISHERS_MAX:
            return True
        pause: float = FINISHER_BACKOFF_SECONDS * FINISHER_BACKOFF_FACTOR ** (self._count - 1)
        return monotonic - self._launched_at >= pause


class TrackedTask:
    """A task, the offset up to which its journal was read, and an event for waiters.

    status_message: the reason why the task is waiting or blocked; empty if neither.
    published_seq: the last record that this server published to subscribers of all tasks; 0 for none.
    """

    def __init__(self, indexed: IndexedTask, owner: JournalOwner) -> None:
        self.task: Task = indexed.task
        self.offset: int = indexed.offset
        self.published_seq = 0
        self._owner = owner
        self.write_lock = asyncio.Lock()
        self.finishers = FinisherHistory()
        self.status_message = ""
        self._logged_message = ""
        self._idle_since: tuple[int, float] | None = None
        self._changed_event = asyncio.Event()
        self._end_event = asyncio.Event()
        self._wake_event = asyncio.Event()

    @property
    def owner(self) -> JournalOwner:
        """Who writes the journal."""
        return self._owner

    def transfer(self, owner: JournalOwner) -> None:
        """Set a new owner, and make the tailer check the journal.

        The caller holds `write_lock`, unless it is the tailer.
        """
        self._owner = owner
        self.wake()

    def writer_lock_state(self, journals: Journals) -> LockState:
        """Return whether the journal has a live writer. Raises OSError if this host cannot determine it."""
        match self._owner:
            case ServerOwned():
                return LockState.HELD
            case RunnerOwned(runner):
                return runner.lock_state()
            case NoKnownOwner():
                return journals.lock_state(self.task.id)

    @property
    def replay_state(self) -> ReplayState:
        """The state from which to continue reading."""
        return ReplayState(self.task, self.offset)

    @property
    def indexed(self) -> IndexedTask:
        """The task as a row of the store."""
        return IndexedTask(self.task, self.offset)

    @property
    def task_with_status_message(self) -> Task:
        """The task as shown to users, with `status_message`."""
        return self.with_status_message(self.task)

    def with_status_message(self, task: Task) -> Task:
        """Return the task with `status_message`, if there is one and the task has not ended."""
        if not self.status_message or task.state.is_final:
            return task
        return msgspec.structs.replace(task, state_message=self.status_message)

    def report_error(self, error: Exception) -> None:
        """Show an error that blocks the task in the task's status, and log it once."""
        note = f"Blocked, retrying every second: {error}"
        if note != self._logged_message:
            is_expected = isinstance(error, OSError | StoreError)
            _log.error("Task %s: %s", self.task.id, note, exc_info=None if is_expected else error)
        self._logged_message = note
        self.status_message = note

    def update(self, task: Task, offset: int) -> None:
        """Set the task and offset that were read, and wake all waiters."""
        self.task, self.offset, self.status_message, self._logged_message = task, offset, "", ""
        changed_event, self._changed_event = self._changed_event, asyncio.Event()
        changed_event.set()
        if task.state.is_final:
            self._end_event.set()

    def has_been_idle_for(self, seconds: float, monotonic: float) -> bool:
        """Return whether nothing has been recorded for this long since the first call in this server process."""
        if self._idle_since is None or self._idle_since[0] != self.task.last_seq:
            self._idle_since = (self.task.last_seq, monotonic)
        return monotonic - self._idle_since[1] >= seconds

    def wake(self) -> None:
        """Make the tailer check the journal now. Called after the server wrote to the journal or released its lock."""
        self._wake_event.set()

    async def wait_for_wake(self, timeout_seconds: float) -> None:
        """Wait for `wake` or the timeout."""
        await _wait_until_set(self._wake_event, timeout_seconds)
        self._wake_event.clear()

    async def wait_for_change(self, timeout_seconds: float) -> None:
        """Wait for the next change or the timeout."""
        await _wait_until_set(self._changed_event, timeout_seconds)

    async def wait_for_end(self, timeout_seconds: float) -> None:
        """Wait until the task has ended or the timeout. Thousands of waiters do not wake up at each change."""
        if not self.task.state.is_final:
            await _wait_until_set(self._end_event, timeout_seconds)


async def _wait_until_set(event: asyncio.Event, timeout_seconds: float) -> None:
    # Do not use wait_for: in Python 3.11 it loses a cancellation that coincides with the wake-up.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await event.wait()


TrackedTasks = Mapping[str, TrackedTask]
"""The tasks that the tailer follows until it has published their end, keyed by id. Only the tailer changes it."""
