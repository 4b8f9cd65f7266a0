"""Buffers the latest events of a task and encodes them once for all subscribers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence

from sandbox.api.streaming_response import Encoder, MessageBatch, close_iterator, encode_each
from sandbox.interfaces.server_services import TaskEvents
from sandbox.model.task import Task
from sandbox.model.wire.event_conversion import WireEvent, estimate_memory_bytes
from sandbox.primitives import fair_client_shares

BATCH_SECONDS = 0.05
BUFFER_BYTES_MAX = 1024 * 1024
HISTORY_BYTES_MAX = 4 * 1024 * 1024
_BATCH_BYTES = 64 * 1024
_HISTORY_BATCH_BYTES = 256 * 1024
CACHED_ENCODERS_MAX = 8
CACHED_BYTES_MAX = 32 * 1024 * 1024
"""Maximum memory for the encoded messages and the history of all tasks. Above it, the oldest batches are dropped."""

_MESSAGE_OVERHEAD_BYTES = 64


class CacheMemory:
    """Counts the memory of all cached batches and drops the oldest, whose events can be read and encoded again."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self._batches: OrderedDict[Batch, int] = OrderedDict()

    def add(self, batch: Batch, cached_bytes: int) -> None:
        """Add to a batch's counted memory. If the total exceeds the maximum, drop other batches."""
        self._batches[batch] = self._batches.get(batch, 0) + cached_bytes
        self.used_bytes += cached_bytes
        while self.used_bytes > CACHED_BYTES_MAX and len(self._batches) > 1:
            next(iter(self._batches)).drop()

    def remove(self, batch: Batch) -> None:
        """Stop counting the batch."""
        self.used_bytes -= self._batches.pop(batch, 0)


class Batch:
    """Consecutive events after `after`, with the cached results of their encoders.

    Clients choose their encoders, so a batch caches the results of at most CACHED_ENCODERS_MAX encoders.

    on_drop: called when the batch is dropped.
    """

    def __init__(
        self,
        after: int,
        events: Sequence[WireEvent],
        size_bytes: int,
        memory: CacheMemory,
        on_drop: Callable[[Batch], None] | None = None,
    ) -> None:
        self.after = after
        self.last_seq = int(events[-1]["seq"])
        self.is_end = events[-1]["type"] == "end"
        self.size_bytes = size_bytes
        self.is_dropped = False
        self._events = events
        self._memory = memory
        self._on_drop = on_drop
        self._encoded: dict[Encoder, MessageBatch] = {}

    def encode(self, encoder: Encoder, after: int) -> MessageBatch:
        """Return the encoder's messages for the events after `after`."""
        if after > self.after:
            return encoder.encode([event for event in self._events if event["seq"] > after])
        result = self._encoded.get(encoder)
        if result is None:
            result = encoder.encode(self._events)
            if len(self._encoded) < CACHED_ENCODERS_MAX and not self.is_dropped:
                self._encoded[encoder] = result
                self._memory.add(self, sum(len(message) + _MESSAGE_OVERHEAD_BYTES for message in result))
        return result

    def drop(self) -> None:
        """Remove the cached results, and cache no others. Streams that use the batch can still encode its events."""
        if not self.is_dropped:
            self.is_dropped = True
            self._encoded.clear()
            self._memory.remove(self)
            if self._on_drop is not None:
                self._on_drop(self)


class HistoryCache:
    """Recently read events for clients that lag behind the buffer, shared by clients at the same position."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self._batches: deque[Batch] = deque()
        self._cached_bytes = 0
        self._load_lock = asyncio.Lock()

    async def get_or_load(self, after: int, events: Callable[[], AsyncIterator[WireEvent]]) -> Batch | None:
        """Return a batch that contains the event after `after`, or None if there is no such event.

        events: reads all events after `after`. One client reads at a time, and waiting clients use its result. Each
            token can have only one stream waiting here, so one token's many streams do not delay other tokens' streams.
        """
        async with fair_client_shares.history_read_slot(), self._load_lock:
            return self.find(after) or await self.load(events(), after)

    def find(self, after: int) -> Batch | None:
        """Return a cached batch that contains the event after `after`."""
        return next((batch for batch in self._batches if batch.after <= after < batch.last_seq), None)

    def close(self) -> None:
        """Drop all batches."""
        while self._batches:
            self._batches[0].drop()

    async def load(self, events: AsyncIterator[WireEvent], after: int) -> Batch | None:
        """Read events until a batch is full; return the batch, or None if there are no events.

        events: those after `after`.
        """
        result: list[WireEvent] = []
        kept_bytes = 0
        with fair_client_shares.uncharged_work():
            try:
                async for event in events:
                    result.append(event)
                    kept_bytes += estimate_memory_bytes(event)
                    if kept_bytes > _HISTORY_BATCH_BYTES:
                        break
            finally:
                await close_iterator(events)
        return self._store(Batch(after, result, kept_bytes, self._memory, self._remove)) if result else None

    def _store(self, batch: Batch) -> Batch:
        self._batches.append(batch)
        self._cached_bytes += batch.size_bytes
        self._memory.add(batch, batch.size_bytes)
        while self._cached_bytes > HISTORY_BYTES_MAX and len(self._batches) > 1:
            self._batches[0].drop()
        return batch

    def _remove(self, batch: Batch) -> None:
        self._batches.remove(batch)
        self._cached_bytes -= batch.size_bytes


class StreamBuffer:
    """The latest batches of one task.

    events: starts with the current state, like `TaskEvents.follow` without `after`.
    """

    def __init__(self, events: AsyncIterator[WireEvent], memory: CacheMemory) -> None:
        self.subscriber_count = 0
        self.changed = asyncio.Event()
        self.history = HistoryCache(memory)
        self._memory = memory
        self._batches: deque[Batch] = deque()
        self._buffered_bytes = 0
        self._pending: list[WireEvent] = []
        self._pending_bytes = 0
        self._oldest_seq: int | None = None
        self._last_seq = 0
        self.is_finished = False
        self._loop = asyncio.get_running_loop()
        self._published_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        with fair_client_shares.uncharged_work():
            self._reader = asyncio.create_task(self._read(events))

    async def wait_started(self) -> None:
        """Wait until the first event or the end has been read, so that `covers` is meaningful."""
        while self._oldest_seq is None and not self.is_finished:
            await self.changed.wait()

    def covers(self, after: int) -> bool:
        """Return whether all events after `after` are or will be in the buffer."""
        may_follow = not self.is_finished or after < self._last_seq
        return may_follow and self._oldest_seq is not None and after >= self._oldest_seq

    def batches_after(self, after: int) -> list[Batch]:
        """Return the batches with events after `after`, oldest first."""
        result: list[Batch] = []
        for batch in reversed(self._batches):
            if batch.last_seq <= after:
                break
            result.append(batch)
        return result[::-1]

    async def close(self) -> None:
        """Stop reading, and drop all batches."""
        self.history.close()
        for batch in self._batches:
            batch.drop()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self, events: AsyncIterator[WireEvent]) -> None:
        try:
            async for event in events:
                if self._oldest_seq is None:
                    self._oldest_seq = self._last_seq = int(event["seq"])
                    self._notify()
                    continue
                self._pending.append(event)
                self._pending_bytes += estimate_memory_bytes(event)
                if self._pending_bytes > _BATCH_BYTES:
                    self._publish()
                    await asyncio.sleep(0)
                elif self._timer is None:
                    self._timer = self._loop.call_at(self._published_at + BATCH_SECONDS, self._publish)
            self._publish()
        finally:
            # After an error, each subscriber continues with its own iterator, which raises the error again.
            self.is_finished = True
            if self._timer is not None:
                self._timer.cancel()
            self._notify()
            await close_iterator(events)

    def _publish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._pending:
            return
        batch = Batch(self._last_seq, self._pending, self._pending_bytes, self._memory)
        self._pending, self._pending_bytes = [], 0
        self._batches.append(batch)
        self._buffered_bytes += batch.size_bytes
        while self._buffered_bytes > BUFFER_BYTES_MAX and len(self._batches) > 1:
            dropped = self._batches.popleft()
            dropped.drop()
            self._buffered_bytes -= dropped.size_bytes
            self._oldest_seq = dropped.last_seq
        self._last_seq, self._published_at = batch.last_seq, self._loop.time()
        self._notify()

    def _notify(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class StreamCache:
    """Shares events and their encoding between the subscribers of a task.

    Each subscriber has its own position; no event is skipped.
    """

    def __init__(self, events: TaskEvents) -> None:
        self._events = events
        self._memory = CacheMemory()
        self._buffers: dict[str, StreamBuffer] = {}

    def follow(self, task: Task, encoder: Encoder, *, after: int | None) -> AsyncIterator[MessageBatch]:
        """Follow a task as `TaskEvents.follow` does, and encode the task's events."""
        if task.state.is_final:
            return encode_each(self._events.follow(task.id, after=after), encoder)
        return self._follow(task.id, encoder, after)

    async def _follow(self, task_id: str, encoder: Encoder, position: int | None) -> AsyncIterator[MessageBatch]:
        buffer = self._acquire(task_id)
        try:
            while True:
                batches = None if position is None else await self._next_batches(task_id, buffer, position)
                if position is None or batches is None:
                    events = self._events.follow(task_id, after=position)
                    try:
                        async for event in events:
                            yield encoder.encode((event,))
                            position, is_end = int(event["seq"]), event["type"] == "end"
                            del event
                            if is_end:
                                return
                            await buffer.wait_started()
                            if buffer.covers(position):
                                break
                    finally:
                        await close_iterator(events)
                    continue
                for batch in batches:
                    async with fair_client_shares.current_memory_share().reservation(batch.size_bytes):
                        yield batch.encode(encoder, position)
                    position = batch.last_seq
                    if batch.is_end:
                        return
                    del batch
                del batches  # a stream that is waiting for events must not hold any
        finally:
            await self._release(task_id, buffer)

    async def _next_batches(self, task_id: str, buffer: StreamBuffer, position: int) -> Sequence[Batch] | None:
        """Return the batches after `position`. If the buffer has none, wait for a change and return an empty list.

        A client that lags behind the buffer gets batches from the history cache until it catches up. Returns None if
        neither the buffer nor the history has the next event.
        """
        await buffer.wait_started()
        if buffer.covers(position):
            changed, batches = buffer.changed, buffer.batches_after(position)
            if not batches:
                await changed.wait()
            return batches
        await asyncio.sleep(0)
        batch = await buffer.history.get_or_load(
            position, lambda: self._events.recorded_events(task_id, after=position)
        )
        return None if batch is None else [batch]

    def _acquire(self, task_id: str) -> StreamBuffer:
        buffer = self._buffers.get(task_id)
        # The id of a pruned task may be reused while a client still reads the end of the old task.
        if buffer is None or buffer.is_finished:
            buffer = self._buffers[task_id] = StreamBuffer(self._events.follow(task_id), self._memory)
        buffer.subscriber_count += 1
        return buffer

    async def _release(self, task_id: str, buffer: StreamBuffer) -> None:
        buffer.subscriber_count -= 1
        if buffer.subscriber_count == 0:
            if self._buffers.get(task_id) is buffer:
                del self._buffers[task_id]
            await buffer.close()
