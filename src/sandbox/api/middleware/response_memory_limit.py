"""Limits how much memory each client's unread responses use. A response that exceeds the limit is replaced by a 429."""

from __future__ import annotations

import sys
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api.errors import retry_after_header
from sandbox.api.json_responses import problem_response
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import MemoryShare

CHUNK_BYTES = 64 * 1024
"""A body is sent in chunks of this size, so its memory is counted until the client has read most of it."""

_SOCKET_BYTES = 2 * CHUNK_BYTES
"""Bytes that a connection buffers for its client: up to one chunk more than the high-water mark."""

_SMALL_BYTES = 4 * 1024
"""Responses up to this size are never refused, because the change that they report has already taken effect."""

_CONTENT_MESSAGE_TYPES = frozenset({"http.response.body", "websocket.send"})
_REFUSAL_TEXT = "Unread responses to this token use all memory that is available to it; read or close some of them."


class ResponseRefusedError(OSError):
    """No memory was left for the response, so an error response was sent instead."""


async def respond_within_memory(app: ASGIApp, scope: Scope, receive: Receive, send: Send, memory: MemoryShare) -> None:
    """Call the app and send its response as fast as the client's share of the event loop allows.

    If `memory` is exhausted, send a 429 instead.
    """
    response = _MemoryReservingResponse(scope, receive, send, memory)
    if not await memory.try_reserve(0):
        await response.refuse()
        return
    with suppress(ResponseRefusedError):
        await app(scope, receive, response.send)


class _MemoryReservingResponse:
    """A response. If its length is known, the head is not sent until memory for the body is reserved."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, memory: MemoryShare) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._memory = memory
        self._head: Message | None = None
        self._close = scope["state"].get("abort", _close_nothing)

    async def send(self, message: Message) -> None:
        """Send one message of the response."""
        if message["type"] == "http.response.start" and "content-length" in Headers(raw=message["headers"]):
            self._head = message
        elif message["type"] not in _CONTENT_MESSAGE_TYPES:
            await self._send(message)
        else:
            await self._send_content(message)

    async def refuse(self) -> None:
        """Send an error instead of the response."""
        connection = HTTPConnection(self._scope)
        headers = retry_after_header(None)
        response = problem_response(
            connection, 429, code="response_memory_exceeded", message=_REFUSAL_TEXT, headers=headers
        )
        await response(self._scope, self._receive, self._send)

    async def _send_content(self, message: Message) -> None:
        size_bytes = _size_bytes(message)
        head, self._head = self._head, None
        if head is None or size_bytes <= _SMALL_BYTES:
            self._memory.force_reserve(size_bytes)
        elif not await self._memory.try_reserve(size_bytes):
            await self.refuse()
            raise ResponseRefusedError
        try:
            if head is not None:
                await self._send(head)
            if message["type"] == "http.response.body":
                await self._send_chunks(message)
            else:
                await self._send_in_turn(message, size_bytes)
        finally:
            self._memory.release(size_bytes)

    async def _send_chunks(self, message: Message) -> None:
        body, has_more = message.get("body", b""), message.get("more_body", False)
        for begin in range(0, len(body) or 1, CHUNK_BYTES):
            chunk = body[begin : begin + CHUNK_BYTES]
            is_last = begin + CHUNK_BYTES >= len(body)
            await self._send_in_turn({**message, "body": chunk, "more_body": has_more or not is_last}, len(chunk))

    async def _send_in_turn(self, message: Message, size_bytes: int) -> None:
        await fair_client_shares.wait_for_turn(size_bytes)
        with self._memory.forced_reservation(_SOCKET_BYTES), self._memory.sending(self._close):
            await self._send(message)


def _size_bytes(message: Message) -> int:
    """Return the size of a message in memory. One wide character makes a string take four bytes per character."""
    if (text := message.get("text")) is not None:
        return sys.getsizeof(text)
    return len(message.get("body") or message.get("bytes") or b"")


def _close_nothing() -> None:
    """Do nothing, because the request has no connection that can be aborted."""
