"""Broadcast of live events of all tasks to subscribers."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from sandbox.model.limits import SUBSCRIBER_BYTES_MAX, SUBSCRIBER_EVENTS_MAX
from sandbox.model.wire.events import WireEvent, wire_size_bytes


class Broadcast:
    """Never waits for a subscriber: a slow one gets a `gap` event per task instead of the events it missed."""

    def __init__(self) -> None:
        self._subscribers: set[_Subscriber] = set()

    @property
    def has_subscribers(self) -> bool:
        """Whether there are subscribers, so creating an event is worthwhile."""
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


class _Subscriber:
    def __init__(self) -> None:
        self._queue: deque[WireEvent] = deque()
        self._queued_bytes = 0
        self._gaps: dict[str, WireEvent] = {}
        self._arrived = asyncio.Event()

    def push(self, event: WireEvent) -> None:
        is_full = len(self._queue) >= SUBSCRIBER_EVENTS_MAX or self._queued_bytes >= SUBSCRIBER_BYTES_MAX
        if self._gaps or is_full:
            self._record_gap(event)
        else:
            self._queue.append(event)
            self._queued_bytes += wire_size_bytes(event)
        self._arrived.set()

    async def next(self) -> WireEvent:
        while not self._queue:
            if self._gaps:
                self._queue.extend(self._gaps.values())
                self._queued_bytes = sum(map(wire_size_bytes, self._queue))
                self._gaps.clear()
                continue
            self._arrived.clear()
            await self._arrived.wait()
        event = self._queue.popleft()
        self._queued_bytes -= wire_size_bytes(event)
        return event

    def _record_gap(self, event: WireEvent) -> None:
        task_id = str(event["task_id"])
        gap = self._gaps.setdefault(
            task_id, {**_identity_fields(event), "type": "gap", "first_seq": event["seq"], "reason": "slow_client"}
        )
        gap.update(_identity_fields(event), last_seq=event["seq"])


def _identity_fields(event: WireEvent) -> WireEvent:
    return {key: event[key] for key in ("task_id", "seq", "timestamp")}
