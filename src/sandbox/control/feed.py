"""One task as the server sees it while it lives."""

import asyncio

from sandbox.contracts.recorder import Reading, Recorder
from sandbox.contracts.store import Indexed
from sandbox.model.task import Task


class Feed:
    """The task, how far its journal is read, and a bell for whoever waits for more.

    recorder: set while the server itself holds the journal (until launch); whoever uses it holds `writing`.
    """

    def __init__(self, indexed: Indexed, recorder: Recorder | None = None) -> None:
        self.task: Task = indexed.task
        self.offset: int = indexed.offset
        self.recorder = recorder
        self.writing = asyncio.Lock()
        self.finishers_launched = 0
        self._bell = asyncio.Event()

    @property
    def reading(self) -> Reading:
        """Where the follower goes on."""
        return Reading(self.task, self.offset)

    @property
    def indexed(self) -> Indexed:
        """What the store keeps of it."""
        return Indexed(self.task, self.offset)

    def advance(self, task: Task, offset: int) -> None:
        """Take what was read, and wake everybody who waits."""
        self.task, self.offset = task, offset
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    async def changed(self, timeout_seconds: float) -> None:
        """Return at the next change, or when the time is over."""
        bell = self._bell
        try:
            async with asyncio.timeout(timeout_seconds):
                await bell.wait()
        except TimeoutError:
            return
