"""Brings a wish to cancel to whoever holds the task's journal: the server, a runner, or nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalDamagedError, Journals
from sandbox.interfaces.placement import OUTCOME_KEPT, CancelOrder, RunnerControl, RunnerUnreachableError
from sandbox.interfaces.tasks import TaskTerminalError, UnavailableError
from sandbox.model.events import CancelRequested
from sandbox.model.limits import CANCEL_LAST_SECONDS, CANCEL_SECONDS
from sandbox.model.state_machine import IllegalEventError
from sandbox.model.task import Task
from sandbox.server.launcher import Launcher, cancel_pending
from sandbox.server.tracked_task import Feed

_NOT_BEGUN = "The task had not begun and is cancelled."
_STOPPED = "The task is being stopped; what it made until now is kept."


class Cancelling:
    """Tries until the wish is on disk, or CANCEL_SECONDS are over, and what the last try takes."""

    def __init__(self, journals: Journals, runners: RunnerControl, launcher: Launcher, clock: Clock) -> None:
        self._journals = journals
        self._runners = runners
        self._launcher = launcher
        self._clock = clock

    async def cancel(self, feed: Feed, order: CancelOrder) -> str:
        """Gives the message for the caller once the wish is durable. Raises TaskTerminalError, UnavailableError."""
        deadline = self._clock.monotonic() + CANCEL_SECONDS
        async with self._writing(feed, deadline):
            pass
        # However long that took: a runner that has just been started is asked.
        deadline = max(deadline, self._clock.monotonic() + CANCEL_LAST_SECONDS)
        while True:
            try:
                message = await self._try(feed, order, deadline)
            except (JournalDamagedError, IllegalEventError) as error:
                raise UnavailableError(f"The task is held up, and cannot be cancelled: {error.message}") from error
            except OSError as error:
                raise UnavailableError(f"The wish could not be carried out: {error}; try again.") from error
            if message is not None:
                return message
            if self._clock.monotonic() >= deadline:
                raise UnavailableError(f"The runner of task {feed.task.id} does not answer; try again.")
            await feed.changed(0.05)

    async def _try(self, feed: Feed, order: CancelOrder, deadline: float) -> str | None:
        """None to try again."""
        wish = CancelRequested(order.reason, order.force)
        async with self._writing(feed, deadline):
            if feed.recorder is not None:
                await asyncio.to_thread(cancel_pending, feed.recorder, wish)
                feed.recorder = None
                feed.stir()
                return _NOT_BEGUN
        if feed.task.state.is_terminal:
            raise TaskTerminalError(feed.task)
        if feed.task.attempt is None:
            return await self._take_wish(feed, wish, deadline)
        try:
            receipt = await self._runners.cancel(feed.task.attempt.id, order)
        except RunnerUnreachableError:
            return await self._take_wish(feed, wish, deadline)
        if receipt.unwritten:
            raise OSError(receipt.message)
        if not receipt.done:
            return None
        return receipt.message or _STOPPED

    async def _take_wish(self, feed: Feed, wish: CancelRequested, deadline: float) -> str | None:
        if self._journals.is_held(feed.task.id):
            return None
        async with self._launcher.turn_for_wish(self._left(deadline)) as turn, self._writing(feed, deadline):
            task = await self._launcher.take_wish(feed, wish, turn)
        return None if task is None else _consequence(task)

    @asynccontextmanager
    async def _writing(self, feed: Feed, deadline: float) -> AsyncIterator[None]:
        """Hold `feed.writing`. Raises UnavailableError where the deadline passes before it is free."""
        try:
            async with asyncio.timeout(self._left(deadline)):
                await feed.writing.acquire()
        except TimeoutError as error:
            what = f"Task {feed.task.id} is just being handed over to a runner and cannot be cancelled meanwhile"
            raise UnavailableError(f"{what}; try again.") from error
        try:
            yield
        finally:
            feed.writing.release()

    def _left(self, deadline: float) -> float:
        return max(deadline - self._clock.monotonic(), CANCEL_LAST_SECONDS)


def _consequence(task: Task) -> str:
    """What a wish means for a task that has just got it."""
    if task.cancel is None:
        return OUTCOME_KEPT
    return _NOT_BEGUN if task.attempt is None else _STOPPED
