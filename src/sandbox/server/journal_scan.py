"""Journals of any length, looked through whole: in threads of their own, a few at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from sandbox.interfaces.journal import Journals, JournalWriter, Reading, read_task
from sandbox.model.limits import JOURNALS_LOOKED_THROUGH_MAX
from sandbox.system.threads import wait_in_thread


class Turn:
    """The right to look through one journal; given back once neither its holder nor a thread needs it."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._users = 1

    def enter(self) -> None:
        """A thread begins to work in it."""
        self._users += 1

    def leave(self) -> None:
        """A thread, or the holder, needs it no longer."""
        self._users -= 1
        if self._users == 0:
            self._turns.release()


class LongJournals:
    """What takes a gigabyte's time keeps neither submissions nor the health from the threads that all share."""

    def __init__(self, journals: Journals) -> None:
        self._journals = journals
        self._turns = asyncio.Semaphore(JOURNALS_LOOKED_THROUGH_MAX)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for a turn, and hold it. Locks that others wait for are taken within, so that nobody waits for both."""
        await self._turns.acquire()
        turn = Turn(self._turns)
        try:
            yield turn
        finally:
            turn.leave()

    async def open(self, task_id: str, turn: Turn) -> JournalWriter:
        """See `Journals.open`. Who is cancelled holds nothing, though the thread may hold the lock until it ends."""
        opened: list[JournalWriter] = []
        is_awaited = True

        def leave() -> None:
            turn.leave()
            if not is_awaited:
                _close(opened)

        turn.enter()
        try:
            await wait_in_thread(lambda: opened.append(self._journals.open(task_id)), leave)
        except asyncio.CancelledError:
            is_awaited = False
            _close(opened)
            raise
        return opened.pop()

    async def read_on(self, task_id: str, start: Reading, turn: Turn) -> Reading:
        """See `read_task`."""
        turn.enter()
        return await wait_in_thread(partial(read_task, self._journals, task_id, start), turn.leave)

    async def read_task(self, task_id: str) -> Reading:
        """See `read_task`: from the beginning, in a turn of its own."""
        async with self.turn() as turn:
            return await self.read_on(task_id, Reading(None, 0), turn)


def _close(writers: list[JournalWriter]) -> None:
    """Nobody has written with them."""
    while writers:
        with contextlib.suppress(OSError):
            writers.pop().close()
