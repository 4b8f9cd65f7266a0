"""Fair shares of the event loop, of threads and of memory for responses, so no client of the API delays the others."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

MESSAGES_PER_TURN_MAX = 64
"""Maximum number of messages (of up to 4 KiB) that are encoded or sent for one client per event loop iteration."""

CONCURRENT_THREADS_MAX = 2
"""Maximum number of threads that read for one client concurrently, so threads stay free for other clients."""

RESPONSES_BYTES_MAX = 128 * 1024 * 1024
"""Maximum memory for the responses to one client. Above it, streams wait and other responses are refused."""

STALLED_SECONDS = 10.0
"""Once RESPONSES_BYTES_MAX is used up, the client's connections that have accepted no data for this long are closed."""

_CHECK_SECONDS = 1.0
_ABORT_SECONDS = 0.1
"""Time for aborted connections to release their memory."""

_UNIT_BYTES = 4 * 1024
_Result = TypeVar("_Result")
_Parameters = ParamSpec("_Parameters")


_IS_MEMORY_RESERVED: ContextVar[bool] = ContextVar("is_memory_reserved", default=False)
"""Whether the current request has reserved all of its memory in advance."""


class MemoryShare:
    """The memory for one client's responses, across all of its connections. Reservations are granted in FIFO order."""

    def __init__(self, bytes_max: int | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.reserved_bytes = 0
        self._bytes_max = RESPONSES_BYTES_MAX if bytes_max is None else bytes_max
        self._monotonic = monotonic
        self._sending: dict[object, tuple[float, Callable[[], None]]] = {}
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @contextmanager
    def forced_reservation(self, size_bytes: int) -> Iterator[None]:
        """For the duration of the context, reserve memory that is already in use, even above the maximum."""
        self.force_reserve(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    @asynccontextmanager
    async def reservation(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait until there is room, then reserve memory for the duration of the context.

        Within `reserve_for_whole_request`, do neither.
        """
        if _IS_MEMORY_RESERVED.get():
            yield
            return
        await self._wait_for_room(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    async def try_reserve(self, size_bytes: int) -> bool:
        """Reserve memory if there is room, closing stalled connections if needed. Returns whether this succeeded."""
        if not self.has_room(size_bytes) and self._close_stalled():
            await asyncio.sleep(_ABORT_SECONDS)
        if not self.has_room(size_bytes):
            return False
        self.reserved_bytes += size_bytes
        return True

    def has_room(self, size_bytes: int) -> bool:
        """Return whether this much more memory may be reserved."""
        return self.reserved_bytes == 0 or self.reserved_bytes + size_bytes <= self._bytes_max

    def force_reserve(self, size_bytes: int) -> None:
        """Reserve memory that is already in use until `release`, even above the maximum."""
        self.reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Release this reservation."""
        self.reserved_bytes -= size_bytes
        self._admit_waiting()

    @contextmanager
    def closing_if_stalled(self, close: Callable[[], None]) -> Iterator[None]:
        """Register a connection that has data for its client, and may be closed if the client stops accepting it.

        close: closes the connection.
        """
        key = object()
        self._sending[key] = (self._monotonic(), close)
        try:
            yield
        finally:
            del self._sending[key]

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
        while self._waiting and (self._waiting[0][0].cancelled() or self.has_room(self._waiting[0][1])):
            waiter, size_bytes = self._waiting.popleft()
            if not waiter.cancelled():
                self.reserved_bytes += size_bytes
                waiter.set_result(None)

    def _close_stalled(self) -> bool:
        """Close the connections that have accepted no data for STALLED_SECONDS; return whether any were closed."""
        latest = self._monotonic() - STALLED_SECONDS
        stalled = [close for since, close in self._sending.values() if since <= latest]
        for close in stalled:
            close()
        return bool(stalled)


class FairShare:
    """One client's share of the event loop, across all of its connections. Messages are admitted in FIFO order."""

    def __init__(self) -> None:
        self._messages_left = MESSAGES_PER_TURN_MAX
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._has_renewal_scheduled = False
        self.threads = asyncio.Semaphore(CONCURRENT_THREADS_MAX)
        self.history_reads = asyncio.Semaphore()
        self.memory = MemoryShare()

    async def wait_for_turn(self, size_bytes: int) -> None:
        """Wait until a message of this size may be encoded or sent."""
        units = 1 + size_bytes // _UNIT_BYTES
        if self._messages_left > 0 and not self._waiting:
            self._messages_left -= units
            self._schedule_renewal()
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((waiter, units))
        self._schedule_renewal()
        await waiter

    def _schedule_renewal(self) -> None:
        if not self._has_renewal_scheduled:
            self._has_renewal_scheduled = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._has_renewal_scheduled = False
        self._messages_left = MESSAGES_PER_TURN_MAX
        while self._waiting and self._messages_left > 0:
            waiter, units = self._waiting.popleft()
            if not waiter.done():  # otherwise, the wait was cancelled
                waiter.set_result(None)
                self._messages_left -= units
        if self._waiting:
            self._schedule_renewal()


class FairShares:
    """The shares of all active clients."""

    def __init__(self) -> None:
        self._shares: WeakValueDictionary[str, FairShare] = WeakValueDictionary()

    def of(self, client: str) -> FairShare:
        """Return the client's share. It is the same object for as long as it is referenced."""
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = FairShare()
        return share


_SHARE: ContextVar[FairShare | None] = ContextVar("share", default=None)


def set_current_share(share: FairShare) -> None:
    """Use this share in the current asyncio task and in the tasks that it creates."""
    _SHARE.set(share)


@contextmanager
def uncharged_work() -> Iterator[None]:
    """Exempt the work in this context from the shares, because one client must not delay work for several clients."""
    token = _SHARE.set(None)
    try:
        yield
    finally:
        _SHARE.reset(token)


async def wait_for_turn(size_bytes: int) -> None:
    """Wait until the current share allows a message of this size. Return immediately if there is no share."""
    if (share := _SHARE.get()) is not None:
        await share.wait_for_turn(size_bytes)


def current_memory_share() -> MemoryShare:
    """Return the current share's `MemoryShare`, or an unlimited one if no share is in use."""
    share = _SHARE.get()
    return share.memory if share is not None else MemoryShare(sys.maxsize)


@asynccontextmanager
async def reserve_for_whole_request(size_bytes: int) -> AsyncIterator[None]:
    """Reserve all memory that a request needs, including the reservations within the context.

    If requests waited for more memory while they hold some, they could block each other forever.
    """
    async with current_memory_share().reservation(size_bytes):
        token = _IS_MEMORY_RESERVED.set(True)
        try:
            yield
        finally:
            _IS_MEMORY_RESERVED.reset(token)


@asynccontextmanager
async def thread_slot() -> AsyncIterator[None]:
    """Reserve one of the current share's threads for several steps. Limits how many requests load data concurrently."""
    share = _SHARE.get()
    if share is None:
        yield
        return
    async with share.threads:
        with uncharged_work():
            yield


@asynccontextmanager
async def history_read_slot() -> AsyncIterator[None]:
    """Wait until no other stream of the current share is reading a task's history.

    Until the context exits, other streams of the share wait for this one.
    """
    share = _SHARE.get()
    if share is None:
        yield
        return
    async with share.history_reads:
        yield


async def to_thread(
    function: Callable[_Parameters, _Result], *arguments: _Parameters.args, **options: _Parameters.kwargs
) -> _Result:
    """Like `asyncio.to_thread`, but wait until the current share, if there is one, has a free thread."""
    async with thread_slot():
        return await asyncio.to_thread(function, *arguments, **options)
