"""A body that goes out as its frames come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, Protocol, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandbox.api.middleware.response_headers import wants_head_only
from sandbox.api.streaming import fair_share
from sandbox.model.wire.events import Frame

Messages = Sequence[bytes]
"""What goes out together; nothing when all of it was filtered out."""


class View(Protocol):
    """Views that are equal show the same, so that clients can share what was encoded once."""

    def __hash__(self) -> int: ...

    def messages(self, frames: Sequence[Frame]) -> Messages:
        """What a client with this view is sent of these frames."""
        ...


async def seen_alone(frames: AsyncIterator[Frame], view: View) -> AsyncIterator[Messages]:
    """Frames that nobody shares, one at a time."""
    try:
        async for frame in frames:
            yield view.messages((frame,))
    finally:
        await close(frames)


async def close(source: AsyncIterator[Any]) -> None:
    """Let go of what a source holds."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()


READ_AHEAD_BYTES_MAX = 256 * 1024
"""What waits in memory for one client; past it the source is not asked for more until the client took some."""

_SKIPPED_MAX = 256


class ReadAhead:
    """Reads `source` in a task of its own from `__aenter__` on, until it ends or one of `end_after` comes."""

    def __init__(self, source: AsyncIterator[Messages]) -> None:
        self._source = source
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_over = False
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._helpers: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        """The source has taken its first step on return, so a subscription stands."""
        self.end_after(self._read())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing of it runs any longer on return."""
        for helper in self._helpers:
            helper.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)

    def end_after(self, occasion: Coroutine[Any, Any, Any]) -> None:
        """End when `occasion` is over; what is in memory by then is still handed out."""
        helper: asyncio.Task[Any] = asyncio.create_task(occasion)
        helper.add_done_callback(self._note_end)
        self._helpers.append(helper)

    def _note_end(self, _: asyncio.Task[Any]) -> None:
        self._is_over = True
        self._changed.set()

    async def batch(self, idle_seconds: float | None = None) -> list[bytes] | None:
        """Everything that waits; empty when nothing came for `idle_seconds`, None at the end.

        Raises what the source raised.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(idle_seconds):
                await self._changed.wait()
        batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._has_room.set()
        if not self._is_over:
            self._changed.clear()
            return batch
        if not batch:
            self._raise_what_went_wrong()
        return batch or None

    def _raise_what_went_wrong(self) -> None:
        for helper in self._helpers:
            if helper.done() and not helper.cancelled() and (error := helper.exception()):
                raise error

    async def _read(self) -> None:
        skipped = 0
        try:
            async for messages in self._source:
                await fair_share.take(sum(map(len, messages)))
                if messages:
                    await self._hand_over(messages)
                    continue
                skipped += 1
                if skipped % _SKIPPED_MAX == 0:
                    await asyncio.sleep(0)
        finally:
            await close(self._source)

    async def _hand_over(self, messages: Messages) -> None:
        self._waiting.extend(messages)
        self._waiting_bytes += sum(map(len, messages))
        self._changed.set()
        if self._waiting_bytes > READ_AHEAD_BYTES_MAX:
            self._has_room.clear()
            await self._has_room.wait()


KEEP_ALIVE_SECONDS = 15.0
SSE_KEEP_ALIVE = b": keep-alive\n\n"

_UNCOUNTED = nullcontext()


class Streamed(Response):
    """Sends what comes, in batches, until it ends, the client leaves or `ending` is set.

    keep_alive: what is sent when nothing came for KEEP_ALIVE_SECONDS; empty for none.
    counted: holds while it is being sent.
    """

    def __init__(
        self,
        source: AsyncIterator[Messages],
        media_type: str,
        *,
        ending: asyncio.Event | None = None,
        keep_alive: bytes = b"",
        counted: AbstractContextManager[object] = _UNCOUNTED,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"x-accel-buffering": "no"})
        self._read_ahead = ReadAhead(source)
        self._counted = counted
        self._ending = ending
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not wants_head_only(scope):
            await self._stream(receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, receive: Receive, send: Send) -> None:
        idle_seconds = KEEP_ALIVE_SECONDS if self._keep_alive else None
        with self._counted:
            await self._send_batches(idle_seconds, receive, send)

    async def _send_batches(self, idle_seconds: float | None, receive: Receive, send: Send) -> None:
        async with self._read_ahead as read_ahead:
            read_ahead.end_after(disconnected(receive))
            if self._ending is not None:
                read_ahead.end_after(self._ending.wait())
            while (batch := await read_ahead.batch(idle_seconds)) is not None:
                body = b"".join(batch) or self._keep_alive
                await send({"type": "http.response.body", "body": body, "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone; whatever it still sends is ignored."""
    while (await receive())["type"] not in {"http.disconnect", "websocket.disconnect"}:
        pass
