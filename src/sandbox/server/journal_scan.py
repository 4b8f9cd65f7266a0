"""Journals of any length, looked through whole: in threads of their own, a few at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from sandbox.interfaces.journal import Journals, JournalWriter, ReplayState, replay_task
from sandbox.model.limits import JOURNAL_SCANS_MAX
from sandbox.system.threads import run_in_daemon_thread


class ScanSlot:
    """The right to look through one journal; given back once neither its holder nor a thread needs it."""

    def __init__(self, semaphore: asyncio.Semaphore) -> None:
        self._semaphore = semaphore
        self._users = 1

    def acquire(self) -> None:
        """A thread begins to work in it."""
        self._users += 1

    def release(self) -> None:
        """A thread, or the holder, needs it no longer."""
        self._users -= 1
        if self._users == 0:
            self._semaphore.release()


class JournalScanner:
    """What takes a gigabyte's time keeps neither submissions nor the health from the threads that all share."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._semaphore = asyncio.Semaphore(JOURNAL_SCANS_MAX)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[ScanSlot]:
        """Wait for a turn, and hold it. Locks that others wait for are taken within, so that nobody waits for both."""
        await self._semaphore.acquire()
        turn = ScanSlot(self._semaphore)
        try:
            yield turn
        finally:
            turn.release()

    async def open(self, task_id: str, slot: ScanSlot) -> JournalWriter:
        """See `Journals.open`. Who is cancelled holds nothing, though the thread may hold the lock until it ends."""
        opened: list[JournalWriter] = []
        is_awaited = True

        def leave() -> None:
            slot.release()
            if not is_awaited:
                _close_all(opened)

        slot.acquire()
        try:
            await run_in_daemon_thread(lambda: opened.append(self._journals.open(task_id)), leave)
        except asyncio.CancelledError:
            is_awaited = False
            _close_all(opened)
            raise
        return opened.pop()

    async def read_from(self, task_id: str, start: ReplayState, slot: ScanSlot) -> ReplayState:
        """See `read_task`."""
        slot.acquire()
        return await run_in_daemon_thread(partial(replay_task, self._journals, task_id, start), slot.release)

    async def read_task(self, task_id: str) -> ReplayState:
        """See `read_task`: from the beginning, in a turn of its own."""
        async with self.slot() as turn:
            return await self.read_from(task_id, ReplayState(None, 0), turn)


def _close_all(writers: list[JournalWriter]) -> None:
    """Nobody has written with them."""
    while writers:
        with contextlib.suppress(OSError):
            writers.pop().close()
