"""A body that goes out as its frames come."""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sandbox.api.envelope import wants_head_only
from sandbox.api.feed import Encode, Feed
from sandbox.model.frame import Frame

KEEP_ALIVE_SECONDS = 15.0


class Streamed(Response):
    """Sends frames in batches until they end, the client leaves or `ending` is set.

    keep_alive: what is sent when nothing came for KEEP_ALIVE_SECONDS; empty for none.
    """

    def __init__(
        self,
        frames: AsyncIterator[Frame],
        encode: Encode,
        media_type: str,
        *,
        ending: asyncio.Event | None = None,
        keep_alive: bytes = b"",
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"x-accel-buffering": "no"})
        self._feed = Feed(frames, encode)
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
        async with self._feed as feed:
            feed.end_after(disconnected(receive))
            if self._ending is not None:
                feed.end_after(self._ending.wait())
            while (batch := await feed.batch(idle_seconds)) is not None:
                body = b"".join(batch) or self._keep_alive
                await send({"type": "http.response.body", "body": body, "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone; whatever it still sends is ignored."""
    while (await receive())["type"] not in {"http.disconnect", "websocket.disconnect"}:
        pass
