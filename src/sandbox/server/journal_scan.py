"""Scans journals of any length in dedicated threads, a few at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from sandbox.interfaces.journal import Journals, JournalWriter, ReplayState, replay_task
from sandbox.model.limits import JOURNAL_SCANS_MAX
from sandbox.system.daemon_thread import run_in_daemon_thread


class ScanSlot:
    """The right to scan one journal, released once neither its holder nor a thread needs it."""

    def __init__(self, semaphore: asyncio.Semaphore) -> None:
        self._semaphore = semaphore
        self._users = 1

    def acquire(self) -> None:
        """Register a thread that works in the slot."""
        self._users += 1

    def release(self) -> None:
        """Unregister a thread or the holder."""
        self._users -= 1
        if self._users == 0:
            self._semaphore.release()


class JournalScanner:
    """Scans large journals outside the shared thread pool, where they would delay submissions and health checks."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._semaphore = asyncio.Semaphore(JOURNAL_SCANS_MAX)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[ScanSlot]:
        """Wait for a slot and hold it.

        Take locks that others wait for inside it, to avoid holding them while waiting.
        """
        await self._semaphore.acquire()
        scan_slot = ScanSlot(self._semaphore)
        try:
            yield scan_slot
        finally:
            scan_slot.release()

    async def open(self, task_id: str, slot: ScanSlot) -> JournalWriter:
        """Like `Journals.open`.

        After a cancellation the caller holds nothing, but the thread may hold the lock until it ends.
        """
        opened: list[JournalWriter] = []
        has_waiter = True

        def release() -> None:
            slot.release()
            if not has_waiter:
                _close_all(opened)

        slot.acquire()
        try:
            await run_in_daemon_thread(lambda: opened.append(self._journals.open(task_id)), release)
        except asyncio.CancelledError:
            has_waiter = False
            _close_all(opened)
            raise
        return opened.pop()

    async def read_from(self, task_id: str, start: ReplayState, slot: ScanSlot) -> ReplayState:
        """Continue a replay; see `replay_task`."""
        slot.acquire()
        return await run_in_daemon_thread(partial(replay_task, self._journals, task_id, start), slot.release)

    async def read_task(self, task_id: str) -> ReplayState:
        """Replay from the beginning, in a new slot; see `replay_task`."""
        async with self.slot() as slot:
            return await self.read_from(task_id, ReplayState(None, 0), slot)


def _close_all(writers: list[JournalWriter]) -> None:
    """Close writers that wrote nothing."""
    while writers:
        with contextlib.suppress(OSError):
            writers.pop().close()
