"""Journals of any length, looked through whole: in threads of their own, a few at once."""

import asyncio
import contextlib
from functools import partial

from sandbox.contracts.journal import Journals, JournalWriter
from sandbox.contracts.recorder import Reading, read_task
from sandbox.contracts.waiting_thread import wait_in_thread
from sandbox.model.limits import JOURNALS_LOOKED_THROUGH_MAX


class LongJournals:
    """What takes a gigabyte's time keeps neither submissions nor the health from the threads that all share."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._turns = asyncio.Semaphore(JOURNALS_LOOKED_THROUGH_MAX)

    async def open(self, task_id: str) -> JournalWriter:
        """See `Journals.open`. Who is cancelled holds nothing, though the thread may hold the lock until it ends."""
        opened: list[JournalWriter] = []
        is_awaited = True

        def leave() -> None:
            self._turns.release()
            if not is_awaited:
                _close(opened)

        await self._turns.acquire()
        try:
            await wait_in_thread(lambda: opened.append(self._journals.open(task_id)), leave)
        except asyncio.CancelledError:
            is_awaited = False
            _close(opened)
            raise
        return opened.pop()

    async def read_task(self, task_id: str, start: Reading | None = None) -> Reading:
        """See `read_task`."""
        await self._turns.acquire()
        return await wait_in_thread(partial(read_task, self._journals, task_id, start), self._turns.release)


def _close(writers: list[JournalWriter]) -> None:
    """Nobody has written with them."""
    while writers:
        with contextlib.suppress(OSError):
            writers.pop().close()
