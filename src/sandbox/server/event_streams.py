"""Event streams: one task's events, first replayed from the journal and then live, or all tasks' live events."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from weakref import WeakValueDictionary

from sandbox.interfaces.agent import ConvertLine
from sandbox.interfaces.journal import JournalDamagedError, Journals
from sandbox.interfaces.server_services import StateChange, TaskNotFoundError
from sandbox.interfaces.store import ChangePosition, Store
from sandbox.model.events import Output, Record
from sandbox.model.fixed_limits import (
    FOLLOW_BATCH_BYTES,
    HOST_ERROR_PAUSE_SECONDS,
    SUBSCRIBER_BYTES_MAX,
    SUBSCRIBER_EVENTS_MAX,
)
from sandbox.model.task import Task
from sandbox.model.wire.event_bodies import GapEvent
from sandbox.model.wire.event_conversion import (
    WireEvent,
    current_state_event,
    end_event,
    error_event,
    estimate_conversation_memory_bytes,
    estimate_memory_bytes,
    to_wire_event,
)
from sandbox.primitives import fair_client_shares
from sandbox.server.tracked_task import NoKnownOwner, TrackedTask, TrackedTasks

_CHANGE_WAIT_SECONDS = 60.0
_CHANGE_BATCH_SECONDS = 0.05
"""Pause before the index is read again, so that one read returns many changes."""
_CHANGED_TASKS_PER_READ = 100
_DECODED_FACTOR = 5
"""Bytes of memory per byte read: the byte itself, and four bytes per character of text that has a wide character."""
_ALWAYS_QUEUED_BYTES = 256 * 1024
"""Size of the events that may wait for a subscriber even if the memory for responses to its client is used up."""
_GAP_BYTES = 1024
"""Memory that one gap uses. A subscriber that reads nothing has a gap for each task that has events."""


class Broadcast:
    """Live events of all tasks.

    Never waits for a subscriber: a slow one gets one `gap` event per task in place of the events that it missed. The
    events that wait for a subscriber count towards the memory for responses of the client that subscribed.
    """

    def __init__(self) -> None:
        self._subscribers: set[_Subscriber] = set()
        self.next_state_change = asyncio.Event()
        """Set and replaced whenever a change of a task's state is indexed."""

    def notify_state_change(self) -> None:
        """Wake the streams that read state changes from the index."""
        event, self.next_state_change = self.next_state_change, asyncio.Event()
        event.set()

    @property
    def has_subscribers(self) -> bool:
        """Whether there are subscribers. Without subscribers, no event needs to be created."""
        return bool(self._subscribers)

    def publish(self, event: WireEvent) -> None:
        """Send an event to every subscriber."""
        for subscriber in self._subscribers:
            subscriber.push(event)

    def subscribe(self) -> AsyncGenerator[WireEvent, None]:
        """Yield events from this call on, until the iterator is closed."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        return self._stream(subscriber)

    async def _stream(self, subscriber: "_Subscriber") -> AsyncGenerator[WireEvent, None]:
        try:
            while True:
                yield await subscriber.next()
        finally:
            self._subscribers.discard(subscriber)
            subscriber.close()


class _Subscriber:
    def __init__(self) -> None:
        self._queue: deque[WireEvent] = deque()
        self._queued_bytes = 0
        self._memory = fair_client_shares.current_memory_share()
        self._gaps: dict[str, GapEvent] = {}
        self._arrived = asyncio.Event()

    def push(self, event: WireEvent) -> None:
        if self._gaps or self._is_full(size_bytes := estimate_memory_bytes(event)):
            self._record_gap(event)
        else:
            self._queue.append(event)
            self._set_queued_bytes(self._queued_bytes + size_bytes)
        self._arrived.set()

    def _is_full(self, size_bytes: int) -> bool:
        if len(self._queue) >= SUBSCRIBER_EVENTS_MAX or self._queued_bytes >= SUBSCRIBER_BYTES_MAX:
            return True
        is_within_minimum = self._queued_bytes + size_bytes <= _ALWAYS_QUEUED_BYTES
        return not is_within_minimum and not self._memory.has_room(size_bytes)

    def _set_queued_bytes(self, size_bytes: int) -> None:
        change, self._queued_bytes = size_bytes - self._queued_bytes, size_bytes
        if change > 0:
            self._memory.force_reserve(change)
        else:
            self._memory.release(-change)

    def close(self) -> None:
        """Release the memory."""
        self._queue.clear()
        self._gaps.clear()
        self._set_queued_bytes(0)

    async def next(self) -> WireEvent:
        while not self._queue:
            if self._gaps:
                self._queue.extend(self._gaps.values())
                self._set_queued_bytes(sum(map(estimate_memory_bytes, self._queue)))
                self._gaps.clear()
                continue
            self._arrived.clear()
            await self._arrived.wait()
        event = self._queue.popleft()
        self._set_queued_bytes(self._queued_bytes - estimate_memory_bytes(event))
        return event

    def _record_gap(self, event: WireEvent) -> None:
        first = self._gaps.get(event["task_id"])
        if first is None:
            self._set_queued_bytes(self._queued_bytes + _GAP_BYTES)
        self._gaps[event["task_id"]] = {
            "task_id": event["task_id"],
            "seq": event["seq"],
            "timestamp": event["timestamp"],
            "type": "gap",
            "first_seq": event["seq"] if first is None else first["first_seq"],
            "reason": "slow_client",
            "last_seq": event["seq"],
        }


class EventStream:
    """Implements `interfaces.server_services.TaskEvents`.

    Each reader has its own journal offset, and reads only indexed records.

    convert_line: converts output that a runner of an earlier version recorded without conversation events.
    """

    def __init__(
        self,
        tracked_tasks: TrackedTasks,
        journals: Journals,
        store: Store,
        broadcast: Broadcast,
        convert_line: ConvertLine,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._journals = journals
        self._store = store
        self._broadcast = broadcast
        self._convert_line = convert_line
        self._loaded_tasks = WeakValueDictionary[str, TrackedTask]()
        """Tasks loaded from the index for open streams. Many streams of one task share one object."""

    async def recorded_events(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """Yield the current events, and `end` if the task is finished."""
        tracked = self._load_tracked(task_id)
        async for event in self._replay_range(tracked, None, tracked.offset, after):
            yield event
            del event  # a stream that is waiting for memory must not hold any
        if tracked.task.state.is_final:
            yield end_event(tracked.task)

    async def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        """Yield the events after `after`, then live ones, then `end`."""
        tracked = self._load_tracked(task_id)
        if after is None:
            offset: int | None = tracked.offset
            after = tracked.task.last_seq
            yield current_state_event(tracked.task_with_status_message)
        else:
            offset = None
        while True:
            end_offset, is_over = tracked.offset, tracked.task.state.is_final
            async for event in self._replay_range(tracked, offset, end_offset, after):
                # A record may be read twice: a writer removes a record that it cannot flush, and writes it again later.
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
        """Yield live events of all tasks, starting with the first event after the iteration begins."""
        async with contextlib.aclosing(self._broadcast.subscribe()) as events:
            async for event in events:
                yield event

    async def follow_states(
        self, after: ChangePosition | None, *, is_live: bool = True
    ) -> AsyncIterator[StateChange | ChangePosition]:
        """Yield the position of the stream, then the tasks whose state changes, as read from the index."""
        position = await fair_client_shares.to_thread(self._store.last_change_position) if after is None else after
        yield position
        while True:
            next_change = self._broadcast.next_state_change
            changed = await fair_client_shares.to_thread(self._read_changes, position)
            for each in changed:
                position = each.position
                yield each
            if not changed:
                if not is_live:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CHANGE_WAIT_SECONDS):
                        await next_change.wait()
                await asyncio.sleep(_CHANGE_BATCH_SECONDS)

    def _read_changes(self, position: ChangePosition) -> Sequence[StateChange]:
        """Return the next changes with their events.

        The tasks are omitted, because the result stays in memory while a slow client reads it.
        """
        return [
            StateChange(each.position, (current_state_event(each.task), *_final_events(each.task)))
            for each in self._store.changed_tasks(position, _CHANGED_TASKS_PER_READ)
        ]

    async def _wait_for_more(self, tracked: TrackedTask) -> TrackedTask:
        """Wait for new events and return the task to continue with.

        A task loaded from the index is never updated, so load it again. A new task is in the index for a moment before
        the tailer follows it.
        """
        if self._tracked_tasks.get(tracked.task.id) is tracked:
            await tracked.wait_for_change(_CHANGE_WAIT_SECONDS)
            return tracked
        await asyncio.sleep(HOST_ERROR_PAUSE_SECONDS)
        return self._load_tracked(tracked.task.id)

    def _load_tracked(self, task_id: str) -> TrackedTask:
        tracked = self._tracked_tasks.get(task_id)
        if tracked is not None:
            return tracked
        indexed = self._store.load_without_large_fields(task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        loaded = self._loaded_tasks.get(task_id)
        if loaded is None or loaded.indexed != indexed:
            self._loaded_tasks[task_id] = loaded = TrackedTask(indexed, NoKnownOwner())
        return loaded

    async def _replay_range(
        self, tracked: TrackedTask, offset: int | None, end: int, after: int
    ) -> AsyncIterator[WireEvent]:
        """Yield the readable events from `offset` to `end`. If `offset` is None, start after record `after`."""
        task_id = tracked.task.id
        try:
            begin = await self._find_offset(task_id, after + 1) if offset is None else offset
            async for event in self._read_range(tracked.task, begin, end, after):
                yield event
                del event
        except JournalDamagedError as error:
            yield error_event(tracked.task, error.code, error.message)
        except FileNotFoundError:
            yield self._journal_missing_event(tracked)

    async def _find_offset(self, task_id: str, seq: int) -> int:
        """Find the offset of a record. The search counts as one batch, because it reads about as much data as one."""
        await fair_client_shares.wait_for_turn(FOLLOW_BATCH_BYTES)
        return self._journals.find_offset(task_id, seq)

    def _journal_missing_event(self, tracked: TrackedTask) -> WireEvent:
        if self._store.load_without_large_fields(tracked.task.id) is None:
            return error_event(
                tracked.task, TaskNotFoundError.code, "The task was removed; the remaining events are not available."
            )
        return error_event(
            tracked.task, JournalDamagedError.code, "The journal does not exist; restore it from a backup."
        )

    async def _read_range(self, task: Task, offset: int, end: int, after: int) -> AsyncIterator[WireEvent]:
        """Yield events in batches. Other coroutines run after each batch, even after a batch without events."""
        task_id = task.id
        while offset < end:
            await asyncio.sleep(0)
            bytes_max = min(FOLLOW_BATCH_BYTES, end - offset)
            await fair_client_shares.wait_for_turn(bytes_max)
            async with fair_client_shares.current_memory_share().reservation(_DECODED_FACTOR * bytes_max):
                batch = self._journals.read(task_id, offset, bytes_max=bytes_max)
                if not batch.records:
                    return
                longer_bytes = max(0, batch.next_offset - offset - bytes_max)
                offset = batch.next_offset
                with fair_client_shares.current_memory_share().forced_reservation(_DECODED_FACTOR * longer_bytes):
                    for record in batch.records:
                        if record.seq > after and (event := self._to_wire_event(task, record)) is not None:
                            # If the conversation was converted from output, the event contains all text twice.
                            with fair_client_shares.current_memory_share().forced_reservation(
                                estimate_conversation_memory_bytes(event)
                            ):
                                yield event
                                del event
                del batch, record

    def _to_wire_event(self, task: Task, record: Record) -> WireEvent | None:
        output = record.event
        conversation = None
        if isinstance(output, Output) and output.stream != "stderr" and not output.is_parsed:
            conversation = self._convert_line(task.manifest, output.data)
        return to_wire_event(task.id, record, conversation)


def _final_events(task: Task) -> Sequence[WireEvent]:
    return (end_event(task),) if task.state.is_final else ()
