"""Limits for each client: request rate, concurrent requests and streams, and memory for unread responses.

A response that exceeds the client's memory is replaced by a 429.
"""

from __future__ import annotations

import ipaddress
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api.errors import TooManyStreamsError, retry_after_header
from sandbox.api.responses import problem_response
from sandbox.interfaces.auth import Principal
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import FairShare, FairShares, MemoryShare

CONCURRENT_REQUESTS_MAX = 1000
"""Maximum number of concurrent requests per token, including streams; further requests get 429."""

ALL_TASKS_STREAMS_MAX = 100
"""Maximum number of concurrent all-task streams per token; further streams get 429. Each stream encodes every event."""

CLIENTS_MAX = 10_000
"""Maximum number of buckets. Beyond it, the least recently used bucket is dropped; its client gets a new, full one."""

_IPV6_NETWORK_BITS = 64


@dataclass(slots=True)
class _Bucket:
    tokens: float
    updated_at_seconds: float


class RateLimiter:
    """Token buckets of `per_minute` requests that refill within a minute; 0 means unlimited. Performs no I/O."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._monotonic = monotonic
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take_or_wait_seconds(self, client: str) -> int:
        """Take one request from the client's bucket.

        Return 0 if it is allowed; otherwise, return the number of seconds to wait before retrying.
        """
        if self._per_minute == 0:
            return 0
        now, rate = self._monotonic(), self._per_minute / 60
        bucket = self._buckets.pop(client, None) or _Bucket(self._per_minute, now)
        bucket.tokens = min(bucket.tokens + (now - bucket.updated_at_seconds) * rate, self._per_minute)
        bucket.updated_at_seconds = now
        self._buckets[client] = bucket
        if len(self._buckets) > CLIENTS_MAX:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            return math.ceil((1 - bucket.tokens) / rate)
        bucket.tokens -= 1
        return 0


def client_key(address: str | None) -> str:
    """Return the rate limit key of an address: the address itself, or its /64 for IPv6.

    An IPv6 client usually owns a whole /64.
    """
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "address -"
    if parsed.version == 4 or parsed.is_loopback:
        return f"address {parsed}"
    if parsed.ipv4_mapped is not None:
        return f"address {parsed.ipv4_mapped}"
    return f"address {ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False)}"


class ClientLimits:
    """The limits of all clients, and what each client uses now. A client is a token, or an address without a token.

    requests_per_minute: 0 means unlimited.
    """

    def __init__(self, requests_per_minute: int, monotonic: Callable[[], float]) -> None:
        self._rate_limiter = RateLimiter(requests_per_minute, monotonic)
        self._requests_in_progress: Counter[str] = Counter()
        self._all_tasks_streams: Counter[str] = Counter()
        self._shares = FairShares()

    def take_request_or_wait_seconds(self, principal: Principal | None, address: str | None) -> int:
        """Take one request from the bucket of its client.

        Return 0 if it is allowed; otherwise, return the number of seconds to wait before retrying.
        """
        client = f"token {principal.id}" if principal else client_key(address)
        if wait_seconds := self._rate_limiter.take_or_wait_seconds(client):
            return wait_seconds
        return int(principal is not None and self._requests_in_progress[principal.id] >= CONCURRENT_REQUESTS_MAX)

    @contextmanager
    def track_request(self, principal: Principal | None) -> Iterator[None]:
        """Count a request as in progress for the duration of the context. Requests without a token are not counted."""
        name = principal.id if principal else ""
        self._requests_in_progress[name] += bool(name)
        try:
            yield
        finally:
            self._requests_in_progress[name] -= bool(name)
            if not self._requests_in_progress[name]:
                del self._requests_in_progress[name]

    def fair_share_of(self, principal: Principal | None) -> FairShare:
        """Return the client's share of the event loop. All clients without a token share one."""
        return self._shares.of(principal.id if principal else "-")

    @contextmanager
    def reserved_all_tasks_stream(self, principal: Principal | None) -> Iterator[None]:
        """Count an all-task stream while it is open. Raises TooManyStreamsError."""
        name = principal.id if principal else "-"
        if self._all_tasks_streams[name] >= ALL_TASKS_STREAMS_MAX:
            raise TooManyStreamsError(ALL_TASKS_STREAMS_MAX)
        self._all_tasks_streams[name] += 1
        try:
            yield
        finally:
            self._all_tasks_streams[name] -= 1
            if not self._all_tasks_streams[name]:
                del self._all_tasks_streams[name]


CHUNK_BYTES = 64 * 1024
"""A body is sent in chunks of this size, so its memory is counted until the client has read most of it."""

_SOCKET_BYTES = 2 * CHUNK_BYTES
"""Bytes that a connection buffers for its client: up to one chunk more than the high-water mark."""

_SMALL_BYTES = 4 * 1024
"""Responses up to this size are never refused, because they may report a change that has already taken effect."""

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
        with self._memory.forced_reservation(_SOCKET_BYTES), self._memory.closing_if_stalled(self._close):
            await self._send(message)


def _size_bytes(message: Message) -> int:
    """Return the size of a message in memory. One wide character makes a string take four bytes per character."""
    if (text := message.get("text")) is not None:
        return sys.getsizeof(text)
    return len(message.get("body") or message.get("bytes") or b"")


def _close_nothing() -> None:
    """Do nothing, because the request has no connection that can be aborted."""
