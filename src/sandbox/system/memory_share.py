"""Limits the memory that the responses to one client use, even if the client does not read them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

RESPONSE_BYTES_MAX = 128 * 1024 * 1024
"""Maximum memory for the responses to one client. Above it, streams wait and other responses are refused."""

STALLED_SECONDS = 10.0
"""Once RESPONSE_BYTES_MAX is used up, the client's connections that have accepted no data for this long are closed."""

_CHECK_SECONDS = 1.0
_ABORT_SECONDS = 0.1
"""Time for aborted connections to release their memory."""


class MemoryShare:
    """The memory of one client's responses, over all of its connections. Reservations are granted in FIFO order."""

    def __init__(self, bytes_max: int | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.reserved_bytes = 0
        self._bytes_max = RESPONSE_BYTES_MAX if bytes_max is None else bytes_max
        self._monotonic = monotonic
        self._sending: dict[object, tuple[float, Callable[[], None]]] = {}
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @contextmanager
    def forced_reservation(self, size_bytes: int) -> Iterator[None]:
        """Reserve memory that is already in use for the duration of the context, even above the maximum."""
        self.force_reserve(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    @asynccontextmanager
    async def reservation(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait until there is room, then reserve memory for the duration of the context."""
        await self._wait_for_room(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    async def try_reserve(self, size_bytes: int) -> bool:
        """Reserve memory if there is room, closing stalled connections if needed. Returns whether it was reserved."""
        if not self._has_room(size_bytes) and self._close_stalled():
            await asyncio.sleep(_ABORT_SECONDS)
        if not self._has_room(size_bytes):
            return False
        self.reserved_bytes += size_bytes
        return True

    def force_reserve(self, size_bytes: int) -> None:
        """Reserve memory that is already in use until `release`, even above the maximum."""
        self.reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Release this reservation."""
        self.reserved_bytes -= size_bytes
        self._admit_waiting()

    @contextmanager
    def sending(self, close: Callable[[], None]) -> Iterator[None]:
        """Register a connection that has data for its client, for the duration of the context.

        close: closes the connection.
        """
        key = object()
        self._sending[key] = (self._monotonic(), close)
        try:
            yield
        finally:
            del self._sending[key]

    def _has_room(self, size_bytes: int) -> bool:
        return self.reserved_bytes == 0 or self.reserved_bytes + size_bytes <= self._bytes_max

    async def _wait_for_room(self, size_bytes: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((waiter, size_bytes))
        self._admit_waiting()
        try:
            while not waiter.done():
                self._close_stalled()
                await asyncio.wait((waiter,), timeout=_CHECK_SECONDS)
        except asyncio.CancelledError:
            if not waiter.cancel():
                self.release(size_bytes)
            raise

    def _admit_waiting(self) -> None:
        while self._waiting and (self._waiting[0][0].cancelled() or self._has_room(self._waiting[0][1])):
            waiter, size_bytes = self._waiting.popleft()
            if not waiter.cancelled():
                self.reserved_bytes += size_bytes
                waiter.set_result(None)

    def _close_stalled(self) -> bool:
        """Close the connections that have accepted no data for STALLED_SECONDS; return whether there were any."""
        latest = self._monotonic() - STALLED_SECONDS
        stalled = [close for since, close in self._sending.values() if since <= latest]
        for close in stalled:
            close()
        return bool(stalled)
