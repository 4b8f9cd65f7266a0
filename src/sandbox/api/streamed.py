"""A body that goes out as its frames come."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandbox.api.envelope import wants_head_only
from sandbox.api.read_ahead import ReadAhead
from sandbox.api.view import Messages

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
