"""Replays journals of any length in dedicated threads, a few at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial

from sandbox.interfaces.journal import Journals, JournalWriter, Recorder, ReplayState
from sandbox.model.fixed_limits import CONCURRENT_JOURNAL_REPLAYS_MAX
from sandbox.primitives.concurrency import run_in_daemon_thread


class ReplaySlot:
    """The right to replay one journal, released once neither its holder nor a thread needs it."""

    def __init__(self, semaphore: asyncio.Semaphore) -> None:
        self._semaphore = semaphore
        self._users = 1

    def add_user(self) -> None:
        """Register a thread that works in the slot."""
        self._users += 1

    def remove_user(self) -> None:
        """Unregister a thread or the holder; release the slot after the last one."""
        self._users -= 1
        if self._users == 0:
            self._semaphore.release()


class JournalReplayer:
    """Replays large journals outside the shared thread pool, where they would delay submissions and health checks."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._semaphore = asyncio.Semaphore(CONCURRENT_JOURNAL_REPLAYS_MAX)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[ReplaySlot]:
        """Wait for a slot and hold it for the duration of the context.

        Acquire contended locks inside the context, so that they are not held during the wait for a slot.
        """
        await self._semaphore.acquire()
        replay_slot = ReplaySlot(self._semaphore)
        try:
            yield replay_slot
        finally:
            replay_slot.remove_user()

    async def open(self, task_id: str, slot: ReplaySlot) -> JournalWriter:
        """Open a journal in a thread; see `Journals.open`.

        After a cancellation, the caller holds no lock, but the thread may hold one until the thread ends.
        """
        opened: list[JournalWriter] = []
        has_waiter = True

        def release() -> None:
            slot.remove_user()
            if not has_waiter:
                _close_all(opened)

        slot.add_user()
        try:
            await run_in_daemon_thread(lambda: opened.append(self._journals.open(task_id)), release)
        except asyncio.CancelledError:
            has_waiter = False
            _close_all(opened)
            raise
        return opened.pop()

    @asynccontextmanager
    async def recorder(
        self, task_id: str, start: ReplayState, slot: ReplaySlot, now: Callable[[], datetime]
    ) -> AsyncIterator[Recorder]:
        """Open a free journal for the duration of the context; yield its recorder.

        start: the state from which to continue reading. Raises JournalBusyError, OSError, JournalDamagedError.
        """
        writer = await self.open(task_id, slot)
        try:
            replay_state = await self.read_from(task_id, start, slot)
            yield self._journals.recorder(writer, replay_state.task, now)
        finally:
            writer.close()

    async def read_from(self, task_id: str, start: ReplayState, slot: ReplaySlot) -> ReplayState:
        """Continue a replay; see `Journals.replay`."""
        slot.add_user()
        return await run_in_daemon_thread(partial(self._journals.replay, task_id, start), slot.remove_user)

    async def read_task(self, task_id: str) -> ReplayState:
        """Replay from the beginning, in a new slot; see `Journals.replay`."""
        async with self.slot() as slot:
            return await self.read_from(task_id, ReplayState(None, 0), slot)


def _close_all(writers: list[JournalWriter]) -> None:
    """Close writers that wrote nothing."""
    while writers:
        with contextlib.suppress(OSError):
            writers.pop().close()
