"""One task as the server sees it while it lives."""

import asyncio
import contextlib
import logging
from weakref import WeakValueDictionary

import msgspec

from sandbox.interfaces.journal import Reading, Recorder
from sandbox.interfaces.store import Indexed, StoreError
from sandbox.model.limits import FINISHER_PAUSE_FACTOR, FINISHER_PAUSE_SECONDS, FINISHERS_MAX
from sandbox.model.task import Task

_log = logging.getLogger(__name__)


class Feed:
    """The task, how far its journal is read, and a bell for whoever waits for more.

    recorder: set while the server itself holds the journal (until launch); whoever uses it holds `writing`.
    note: what the task waits for, or what keeps it from going on; empty when it does.
    told_seq: the last record that this server has told those who follow all tasks; 0 for none.
    """

    def __init__(self, indexed: Indexed, recorder: Recorder | None = None) -> None:
        self.task: Task = indexed.task
        self.offset: int = indexed.offset
        self.told_seq = 0
        self.recorder = recorder
        self.writing = asyncio.Lock()
        self.finishers_launched = 0
        self.has_told_of_leftovers = False
        self.note = ""
        self._logged = ""
        self._pause_began: tuple[int, float] | None = None
        self._finisher_launched_at = 0.0
        self._bell = asyncio.Event()
        self._stirred = asyncio.Event()

    @property
    def reading(self) -> Reading:
        """Where the follower goes on."""
        return Reading(self.task, self.offset)

    @property
    def indexed(self) -> Indexed:
        """What the store keeps of it."""
        return Indexed(self.task, self.offset)

    @property
    def shown(self) -> Task:
        """The task as its users see it."""
        return self.with_note(self.task)

    def with_note(self, task: Task) -> Task:
        """This task with the note in place of the message, where there is one and the task has not ended."""
        if not self.note or task.state.is_terminal:
            return task
        return msgspec.structs.replace(task, state_message=self.note)

    def complain(self, error: Exception) -> None:
        """Something keeps the task from going on: tell its users, and operators once."""
        note = f"Held up, and tried again every second: {error}"
        if note != self._logged:
            is_expected = isinstance(error, OSError | StoreError)
            _log.error("Task %s: %s", self.task.id, note, exc_info=None if is_expected else error)
        self._logged = note
        self.note = note

    def advance(self, task: Task, offset: int) -> None:
        """Take what was read, and wake everybody who waits."""
        self.task, self.offset, self.note, self._logged = task, offset, "", ""
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    def has_paused(self, seconds: float, monotonic: float) -> bool:
        """Whether nothing has happened for so long, since this was asked first; a new server asks anew."""
        if self._pause_began is None or self._pause_began[0] != self.task.last_seq:
            self._pause_began = (self.task.last_seq, monotonic)
        return monotonic - self._pause_began[1] >= seconds

    def count_finisher(self, monotonic: float) -> None:
        """One was launched at this moment."""
        self.finishers_launched += 1
        self._finisher_launched_at = monotonic

    def has_rested(self, monotonic: float) -> bool:
        """Whether what ended the last finisher had time to pass, where another one follows that may save the work."""
        if not 0 < self.finishers_launched < FINISHERS_MAX:
            return True
        pause: float = FINISHER_PAUSE_SECONDS * FINISHER_PAUSE_FACTOR ** (self.finishers_launched - 1)
        return monotonic - self._finisher_launched_at >= pause

    def stir(self) -> None:
        """The server has written or handed over the journal: let the follower look at once."""
        self._stirred.set()

    async def rest(self, seconds: float) -> None:
        """What the follower does between two looks."""
        # Not wait_for, which in Python 3.11 loses a cancellation that comes together with the stir.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stirred.wait()
        self._stirred.clear()

    async def changed(self, timeout_seconds: float) -> None:
        """Return at the next change, or when the time is over."""
        bell = self._bell
        try:
            async with asyncio.timeout(timeout_seconds):
                await bell.wait()
        except TimeoutError:
            return


class Locks:
    """One lock a name, which is there as long as anybody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        """The lock of this name."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
