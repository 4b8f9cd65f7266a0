"""Tells the story of a task from its journal, to whoever asks, at their own pace."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sandbox.interfaces.journal import JournalDamagedError, Journals
from sandbox.interfaces.store import Store
from sandbox.interfaces.tasks import TaskNotFoundError
from sandbox.model.limits import FOLLOW_BATCH_BYTES, RETRY_SECONDS
from sandbox.model.wire.events import Frame, end_frame, frame, present_state_frame, trouble_frame
from sandbox.server.broadcast import Broadcast
from sandbox.server.journal_tailer import Follower
from sandbox.server.tracked_task import Feed

_CHANGE_WAIT_SECONDS = 60.0


class Telling:
    """Every reader has an offset of its own into the journal, and is never shown what the index does not know yet."""

    def __init__(self, journals: Journals, store: Store, follower: Follower, broadcast: Broadcast) -> None:
        self._journals = journals
        self._store = store
        self._follower = follower
        self._broadcast = broadcast

    async def frames(self, task_id: str, *, after: int) -> AsyncIterator[Frame]:
        """What is there now; `end` too if the task is finished."""
        feed = self._feed(task_id)
        async for shown in self._told(feed, None, feed.offset, after):
            yield shown
        if feed.task.state.is_terminal:
            yield end_frame(feed.task)

    async def follow(self, task_id: str, *, after: int | None) -> AsyncIterator[Frame]:
        """What is there past `after`, then what comes, then `end`."""
        feed = self._feed(task_id)
        if after is None:
            offset: int | None = feed.offset
            after = feed.task.last_seq
            yield present_state_frame(feed.shown)
        else:
            offset = None
        while True:
            reached, is_over = feed.offset, feed.task.state.is_terminal
            async for shown in self._told(feed, offset, reached, after):
                # A writer takes a record back that it could not flush, and then writes it again.
                after = max(after, shown["seq"])
                yield shown
            offset = reached
            if is_over:
                yield end_frame(feed.task)
                return
            if feed.offset == reached and not feed.task.state.is_terminal:
                feed = await self._on(feed)

    async def follow_all(self) -> AsyncIterator[Frame]:
        """Live frames of all tasks, from the first step of the iterator on."""
        async with contextlib.aclosing(self._broadcast.subscribe()) as frames:
            async for shown in frames:
                yield shown

    async def _on(self, feed: Feed) -> Feed:
        """Where its story goes on, after a wait. Nobody advances one that came from the index: a task is in it for a
        moment before it is followed."""
        if self._follower.feeds.get(feed.task.id) is feed:
            await feed.changed(_CHANGE_WAIT_SECONDS)
            return feed
        await asyncio.sleep(RETRY_SECONDS)
        return self._feed(feed.task.id)

    def _feed(self, task_id: str) -> Feed:
        feed = self._follower.feeds.get(task_id)
        if feed is not None:
            return feed
        indexed = self._store.load(task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        return Feed(indexed)

    async def _told(self, feed: Feed, offset: int | None, end: int, after: int) -> AsyncIterator[Frame]:
        """What lies between, as far as it can be read; offset: None for the place of what follows `after`."""
        task_id = feed.task.id
        try:
            begin = self._journals.find(task_id, after + 1) if offset is None else offset
            async for shown in self._between(task_id, begin, end, after):
                yield shown
        except JournalDamagedError as error:
            yield trouble_frame(feed.task, error.code, error.message)
        except FileNotFoundError:
            yield self._without_journal(feed)

    def _without_journal(self, feed: Feed) -> Frame:
        if self._store.load(feed.task.id) is None:
            return trouble_frame(feed.task, TaskNotFoundError.code, "The task is kept no longer; the rest is gone.")
        return trouble_frame(feed.task, JournalDamagedError.code, "The journal is gone; restore it from a backup.")

    async def _between(self, task_id: str, offset: int, end: int, after: int) -> AsyncIterator[Frame]:
        """However much of it shows nothing, everybody else has a turn after each batch."""
        while offset < end:
            await asyncio.sleep(0)
            batch = self._journals.read(task_id, offset, bytes_max=min(FOLLOW_BATCH_BYTES, end - offset))
            if not batch.records:
                return
            offset = batch.next_offset
            for record in batch.records:
                if record.seq > after and (shown := frame(task_id, record)) is not None:
                    yield shown
