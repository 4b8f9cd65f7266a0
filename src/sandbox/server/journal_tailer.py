"""Reads the journals of living tasks into the store and tells subscribers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Batch, Journals, PlaceLostError
from sandbox.interfaces.store import Indexed, Store
from sandbox.model import events as e
from sandbox.model.limits import FOLLOW_POLL_SECONDS, INDEX_INTERVAL_SECONDS, LOSS_CHECK_SECONDS, RETRY_SECONDS
from sandbox.model.state_machine import advance
from sandbox.model.task import Task
from sandbox.model.wire.events import end_frame, frame
from sandbox.server.broadcast import Broadcast
from sandbox.server.journal_scan import LongJournals
from sandbox.server.tracked_task import Feed
from sandbox.system.log_context import work_on

_IDLE_FACTOR = 10
_log = logging.getLogger(__name__)
_INDEXED_AT_ONCE = (
    *(e.AttemptStarted, e.AgentExited, e.AttemptFailed, e.AttemptEnded),
    *(e.CancelRequested, e.ArtifactCollected, e.Progress),
)


class Follower:
    """Follows each living task; the store is never ahead of the journal and at most a second behind."""

    def __init__(self, journals: Journals, store: Store, clock: Clock, broadcast: Broadcast) -> None:
        self.feeds: dict[str, Feed] = {}
        self.on_lost: Callable[[Feed], Awaitable[None]]
        self.on_held: Callable[[Feed], Awaitable[None]]
        self.on_finished: Callable[[Feed], None] = lambda _: None
        self._journals = journals
        self._long_journals = LongJournals(journals)
        self._store = store
        self._clock = clock
        self._broadcast = broadcast
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, feed: Feed, submission: e.Record | None = None) -> None:
        """Begin to follow a task until it is finished; `submission` is told if it is new."""
        task_id = feed.task.id
        if submission is not None:
            self._tell(task_id, submission)
        self.feeds[task_id] = feed
        self._tasks[task_id] = asyncio.create_task(self._follow(feed), name=f"follow {task_id}")

    async def close(self) -> None:
        """Stop following; the tasks go on without us."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self, feed: Feed) -> None:
        """Whatever goes wrong is tried again: a task that nobody follows would never end for its users."""
        work_on(feed.task.id)
        while not feed.task.state.is_terminal:
            try:
                await self._read_on(feed)
            except Exception as error:
                feed.complain(error)
                await asyncio.sleep(RETRY_SECONDS)
        # A pruned task's id may be taken again before who followed the first one has looked up.
        if self.feeds.get(feed.task.id) is feed:
            del self.feeds[feed.task.id], self._tasks[feed.task.id]
            self.on_finished(feed)

    async def _read_on(self, feed: Feed) -> None:
        pause = FOLLOW_POLL_SECONDS
        heard_at = indexed_at = self._clock.monotonic()
        while not feed.task.state.is_terminal:
            batch = await self._read(feed)
            now = self._clock.monotonic()
            if batch.records:
                due = now - indexed_at >= INDEX_INTERVAL_SECONDS or _matters(batch)
                await self._take(feed, batch, is_due=due)
                heard_at, pause = now, FOLLOW_POLL_SECONDS
                indexed_at = now if due else indexed_at
            elif now - heard_at >= LOSS_CHECK_SECONDS:
                heard_at = now
                await self._check_loss(feed)
            # Nobody but the server writes what the server holds, and it stirs the feed when it does.
            await feed.rest(pause if feed.recorder is None else LOSS_CHECK_SECONDS)
            pause = min(pause * 1.2, FOLLOW_POLL_SECONDS * _IDLE_FACTOR)

    async def _read(self, feed: Feed) -> Batch:
        """What is new.

        After a power loss the index may know more than the journal kept: then the story is read from its beginning.
        """
        try:
            # What the server itself writes at this moment may be taken back, when the disk refuses to flush it.
            async with feed.writing:
                batch = self._journals.read(feed.task.id, feed.offset)
                if feed.recorder and batch.records and batch.records[-1].seq > feed.recorder.writer.last_seq:
                    return Batch((), feed.offset)
            if not batch.records or batch.records[0].seq == feed.task.last_seq + 1:
                return batch
        except PlaceLostError:
            pass
        reading = await self._long_journals.read_task(feed.task.id)
        if reading.task is not None:
            await asyncio.to_thread(self._store.save, Indexed(reading.task, reading.offset))
            feed.advance(reading.task, reading.offset)
        return Batch((), feed.offset)

    async def _take(self, feed: Feed, batch: Batch, *, is_due: bool) -> None:
        """Fold first, index second, tell last: what fails before is tried again, and nobody hears it twice."""
        task = feed.task
        for record in batch.records:
            task = advance(task, record.event, seq=record.seq, at=record.at).task
        if is_due:
            await asyncio.to_thread(self._store.save, Indexed(task, batch.next_offset))
        # A writer takes a record back that it could not flush, and then writes it again.
        for record in batch.records[max(0, feed.told_seq + 1 - batch.records[0].seq) :]:
            self._tell(task.id, record)
            if record.transition is not None:
                _log_transition(task, record.transition)
        feed.told_seq = max(feed.told_seq, task.last_seq)
        feed.advance(task, batch.next_offset)
        if task.state.is_terminal and self._broadcast.has_subscribers:
            self._broadcast.send(end_frame(task))

    def _tell(self, task_id: str, record: e.Record) -> None:
        if self._broadcast.has_subscribers and (shown := frame(task_id, record)) is not None:
            self._broadcast.send(shown)

    async def _check_loss(self, feed: Feed) -> None:
        """Silence alone is no loss: only a free lock proves that nobody writes any more."""
        if feed.recorder is not None:
            return
        if self._journals.is_held(feed.task.id):
            feed.note = ""
            await self.on_held(feed)
            return
        if not (await self._read(feed)).records:
            await self.on_lost(feed)


def _log_transition(task: Task, transition: e.Transition) -> None:
    error = task.failure.code if task.failure is not None and transition.new_state.is_terminal else None
    _log.info("Task %s is %s", task.id, transition.new_state, extra={"state": transition.new_state, "error": error})


def _matters(batch: Batch) -> bool:
    return any(record.transition is not None or isinstance(record.event, _INDEXED_AT_ONCE) for record in batch.records)
