"""Streaming responses that send events as they arrive, and the encoding of server-sent events."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandbox.api.responses import is_head_request
from sandbox.api.route_declarations import component_ref
from sandbox.interfaces.server_services import TaskNotFoundError
from sandbox.model.wire.event_conversion import WireEvent
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import MemoryShare

MessageBatch = Sequence[bytes]
"""Messages to send together; empty if no event passed the filter."""


class Encoder(Protocol):
    """Encodes events for clients. Equal encoders return equal results, which clients can therefore share."""

    def __hash__(self) -> int: ...

    def encode(self, events: Sequence[WireEvent]) -> MessageBatch:
        """Return the messages for these events."""
        ...


async def encode_each(events: AsyncIterator[WireEvent], encoder: Encoder) -> AsyncIterator[MessageBatch]:
    """Encode events one at a time, without sharing the results."""
    try:
        async for event in events:
            yield encoder.encode((event,))
            del event  # release the event's memory before waiting for the next event
    finally:
        await close_iterator(events)


async def close_iterator(source: AsyncIterator[Any]) -> None:
    """Close an async generator and release its resources."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()


PREFETCH_BYTES_MAX = 256 * 1024
"""Maximum number of bytes buffered for one client; above it, the source is paused until the client reads."""

_EMPTY_MESSAGES_PER_YIELD = 256


class Prefetcher:
    """Reads `source` in a background task until the source ends or a `stop_after` coroutine completes."""

    def __init__(self, source: AsyncIterator[MessageBatch]) -> None:
        self._source = source
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._taken_bytes = 0
        self._is_finished = False
        self._changed = asyncio.Event()
        self._has_capacity = asyncio.Event()
        self._memory = MemoryShare(sys.maxsize)
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        """Start reading. On return, the source has run to its first suspension, so its subscription is active."""
        self._memory = fair_client_shares.current_memory_share()
        self.stop_after(self._read())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel all tasks and wait for them."""
        for helper in self._tasks:
            helper.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._memory.release(self._taken_bytes + self._pending_bytes)

    def stop_after(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Stop once `coroutine` completes; messages already buffered are still returned."""
        task: asyncio.Task[Any] = asyncio.create_task(coroutine)
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def _on_task_done(self, _: asyncio.Task[Any]) -> None:
        self._is_finished = True
        self._changed.set()

    async def next_batch(self, idle_seconds: float | None = None) -> list[bytes] | None:
        """Return all buffered messages: an empty list after `idle_seconds` without messages, None at the end.

        Raises the source's exception.
        """
        self._memory.release(self._taken_bytes)  # the caller has sent the previous messages
        self._taken_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(idle_seconds):
                await self._changed.wait()
        batch, self._taken_bytes = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        self._has_capacity.set()
        if not self._is_finished:
            self._changed.clear()
            return batch
        if not batch:
            self._raise_task_error()
        return batch or None

    def _raise_task_error(self) -> None:
        for helper in self._tasks:
            if helper.done() and not helper.cancelled() and (error := helper.exception()):
                raise error

    async def _read(self) -> None:
        skipped = 0
        try:
            async for messages in self._source:
                size_bytes = sum(map(len, messages))
                with self._memory.forced_reservation(size_bytes):
                    await fair_client_shares.wait_for_turn(size_bytes)
                skipped += not messages
                if messages:
                    await self._enqueue(messages)
                elif skipped % _EMPTY_MESSAGES_PER_YIELD == 0:
                    await asyncio.sleep(0)
                del messages
        finally:
            await close_iterator(self._source)

    async def _enqueue(self, messages: MessageBatch) -> None:
        self._pending.extend(messages)
        size_bytes = sum(map(len, messages))
        self._pending_bytes += size_bytes
        self._memory.force_reserve(size_bytes)
        self._changed.set()
        if self._pending_bytes > PREFETCH_BYTES_MAX:
            self._has_capacity.clear()
            await self._has_capacity.wait()


KEEP_ALIVE_INTERVAL_SECONDS = 15.0
SSE_KEEP_ALIVE = b": keep-alive\n\n"

_NO_TRACKER = nullcontext()
_log = logging.getLogger(__name__)


class EventStreamResponse(Response):
    """Sends messages in batches until the source ends, the client disconnects or `stop_event` is set.

    keep_alive: sent after KEEP_ALIVE_INTERVAL_SECONDS without a message; nothing is sent if it is empty.
    tracker: context manager that is active while the response is sent.
    """

    def __init__(
        self,
        source: AsyncIterator[MessageBatch],
        media_type: str,
        *,
        stop_event: asyncio.Event | None = None,
        keep_alive: bytes = b"",
        tracker: AbstractContextManager[object] = _NO_TRACKER,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"x-accel-buffering": "no"})
        self._prefetcher = Prefetcher(source)
        self._tracker = tracker
        self._stop_event = stop_event
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        idle_seconds = KEEP_ALIVE_INTERVAL_SECONDS if self._keep_alive else None
        with self._tracker:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if not is_head_request(scope):
                try:
                    await self._send_batches(idle_seconds, receive, send)
                except TaskNotFoundError:
                    _log.info("A stream was cut off: the task was deleted")
                    scope["state"]["abort"]()  # a response that ends normally would look complete
                    await wait_for_disconnect(receive)
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_batches(self, idle_seconds: float | None, receive: Receive, send: Send) -> None:
        async with self._prefetcher as prefetcher:
            prefetcher.stop_after(wait_for_disconnect(receive))
            if self._stop_event is not None:
                prefetcher.stop_after(self._stop_event.wait())
            while (batch := await prefetcher.next_batch(idle_seconds)) is not None:
                body = b"".join(batch) or self._keep_alive
                batch.clear()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                del body


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has disconnected; ignore other messages."""
    while (await receive())["type"] not in {"http.disconnect", "websocket.disconnect"}:
        pass


SSE = "text/event-stream"

EVENT_SCHEMA = component_ref("Event")

_SSE_DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": EVENT_SCHEMA}
SSE_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": _SSE_DATA},
    "required": ["id", "event", "data"],
}


def format_sse_event(event: WireEvent) -> bytes:
    """Encode an event without an id."""
    return f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
