"""Live frames of all tasks for whoever asked for them."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from sandbox.model.limits import SUBSCRIBER_BYTES_MAX, SUBSCRIBER_FRAMES_MAX
from sandbox.model.wire.events import Frame, size_bytes


class Broadcast:
    """Never waits for a subscriber: what a slow one misses is told to it as a `gap` a task."""

    def __init__(self) -> None:
        self._subscribers: set[_Subscriber] = set()

    @property
    def has_subscribers(self) -> bool:
        """Whether making a frame is worth it."""
        return bool(self._subscribers)

    def send(self, frame: Frame) -> None:
        """Hand a frame to every subscriber."""
        for subscriber in self._subscribers:
            subscriber.take(frame)

    def subscribe(self) -> AsyncGenerator[Frame, None]:
        """Frames from this call on, until the iterator is closed."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        return self._frames(subscriber)

    async def _frames(self, subscriber: "_Subscriber") -> AsyncGenerator[Frame, None]:
        try:
            while True:
                yield await subscriber.next()
        finally:
            self._subscribers.discard(subscriber)


class _Subscriber:
    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._missed: dict[str, Frame] = {}
        self._arrived = asyncio.Event()

    def take(self, frame: Frame) -> None:
        is_full = len(self._frames) >= SUBSCRIBER_FRAMES_MAX or self._bytes >= SUBSCRIBER_BYTES_MAX
        if self._missed or is_full:
            self._miss(frame)
        else:
            self._frames.append(frame)
            self._bytes += size_bytes(frame)
        self._arrived.set()

    async def next(self) -> Frame:
        while not self._frames:
            if self._missed:
                self._frames.extend(self._missed.values())
                self._bytes = sum(map(size_bytes, self._frames))
                self._missed.clear()
                continue
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._bytes -= size_bytes(frame)
        return frame

    def _miss(self, frame: Frame) -> None:
        task_id = str(frame["task_id"])
        gap = self._missed.setdefault(
            task_id, {**_identity(frame), "type": "gap", "first_seq": frame["seq"], "reason": "slow_client"}
        )
        gap.update(_identity(frame), last_seq=frame["seq"])


def _identity(frame: Frame) -> Frame:
    return {key: frame[key] for key in ("task_id", "seq", "timestamp")}
