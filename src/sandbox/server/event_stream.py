"""Event streams of tasks, replayed from the journal and then live, at each reader's pace."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sandbox.interfaces.journal import JournalDamagedError, Journals
from sandbox.interfaces.store import Store
from sandbox.interfaces.tasks import TaskNotFoundError
from sandbox.model.limits import FOLLOW_BATCH_BYTES, RETRY_SECONDS
from sandbox.model.wire.events import WireEvent, current_state_event, end_event, error_event, to_wire_event
from sandbox.server.broadcast import Broadcast
from sandbox.server.tracked_task import TrackedTask, TrackedTasks
from sandbox.system import fair_share

_CHANGE_WAIT_SECONDS = 60.0
_DECODED_FACTOR = 5
"""Bytes of memory per byte that is read: a line with one wide character takes four bytes for each of its characters."""


class EventStream:
    """Implements `interfaces.tasks.TaskEvents`.

    Each reader has its own journal offset, and reads only indexed records.
    """

    def __init__(self, tracked_tasks: TrackedTasks, journals: Journals, store: Store, broadcast: Broadcast) -> None:
        self._tracked_tasks = tracked_tasks
        self._journals = journals
        self._store = store
        self._broadcast = broadcast

    async def replay(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """Yield the current events; `end` too if the task is finished."""
        tracked = self._load_tracked(task_id)
        async for event in self._replay_range(tracked, None, tracked.offset, after):
            yield event
            del event  # a stream that waits for memory must not hold any
        if tracked.task.state.is_final:
            yield end_event(tracked.task)

    async def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        """Yield the events after `after`, then live ones, then `end`."""
        tracked = self._load_tracked(task_id)
        if after is None:
            offset: int | None = tracked.offset
            after = tracked.task.last_seq
            yield current_state_event(tracked.snapshot)
        else:
            offset = None
        while True:
            end_offset, is_over = tracked.offset, tracked.task.state.is_final
            async for event in self._replay_range(tracked, offset, end_offset, after):
                # A writer removes a record that it could not flush, and then writes it again.
                after = max(after, event["seq"])
                yield event
                del event
            offset = end_offset
            if is_over:
                yield end_event(tracked.task)
                return
            if tracked.offset == end_offset and not tracked.task.state.is_final:
                tracked = await self._wait_for_more(tracked)

    async def follow_all(self) -> AsyncIterator[WireEvent]:
        """Yield live events of all tasks, starting with the iterator's first step."""
        async with contextlib.aclosing(self._broadcast.subscribe()) as events:
            async for event in events:
                yield event

    async def _wait_for_more(self, tracked: TrackedTask) -> TrackedTask:
        """Wait for new events and return the task to continue with.

        A task loaded from the index is never updated, so load it again. A new task is in the index for a moment before
        the tailer follows it.
        """
        if self._tracked_tasks.get(tracked.task.id) is tracked:
            await tracked.wait_for_change(_CHANGE_WAIT_SECONDS)
            return tracked
        await asyncio.sleep(RETRY_SECONDS)
        return self._load_tracked(tracked.task.id)

    def _load_tracked(self, task_id: str) -> TrackedTask:
        tracked = self._tracked_tasks.get(task_id)
        if tracked is not None:
            return tracked
        indexed = self._store.load(task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        return TrackedTask(indexed)

    async def _replay_range(
        self, tracked: TrackedTask, offset: int | None, end: int, after: int
    ) -> AsyncIterator[WireEvent]:
        """Yield the readable events of a range. With offset None the range starts after `after`."""
        task_id = tracked.task.id
        try:
            begin = await self._find_offset(task_id, after + 1) if offset is None else offset
            async for event in self._read_range(task_id, begin, end, after):
                yield event
                del event
        except JournalDamagedError as error:
            yield error_event(tracked.task, error.code, error.message)
        except FileNotFoundError:
            yield self._journal_missing_event(tracked)

    async def _find_offset(self, task_id: str, seq: int) -> int:
        """Find the offset of a record. This is charged like a batch, because it reads about as much."""
        await fair_share.acquire(FOLLOW_BATCH_BYTES)
        return self._journals.find_offset(task_id, seq)

    def _journal_missing_event(self, tracked: TrackedTask) -> WireEvent:
        if self._store.load(tracked.task.id) is None:
            return error_event(
                tracked.task, TaskNotFoundError.code, "The task was removed; the remaining events are not available."
            )
        return error_event(
            tracked.task, JournalDamagedError.code, "The journal does not exist; restore it from a backup."
        )

    async def _read_range(self, task_id: str, offset: int, end: int, after: int) -> AsyncIterator[WireEvent]:
        """Yield events in batches. Other coroutines run after each batch, even if it yields no events."""
        while offset < end:
            await asyncio.sleep(0)
            bytes_max = min(FOLLOW_BATCH_BYTES, end - offset)
            await fair_share.acquire(bytes_max)
            async with fair_share.current_memory().reserved(_DECODED_FACTOR * bytes_max):
                batch = self._journals.read(task_id, offset, bytes_max=bytes_max)
                if not batch.records:
                    return
                longer_bytes = max(0, batch.next_offset - offset - bytes_max)
                offset = batch.next_offset
                with fair_share.current_memory().holding(_DECODED_FACTOR * longer_bytes):
                    for record in batch.records:
                        if record.seq > after and (event := to_wire_event(task_id, record)) is not None:
                            yield event
                            del event
                del batch, record
