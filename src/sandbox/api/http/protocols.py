"""uvicorn protocols with limits for clients that do not read or do not finish their requests."""

import asyncio
import logging
from typing import Any

import h11
from starlette.requests import HTTPConnection
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from sandbox.api.http.framing import FramedConnection
from sandbox.api.http.unauthenticated_connections import PortState
from sandbox.api.middleware.response_headers import get_request_id
from sandbox.api.responses import problem_response, reason_phrase

STALL_TIMEOUT_SECONDS = 600.0
"""A client that does not read pending data for this long is disconnected."""

HEAD_TIMEOUT_SECONDS = 30.0
"""A client without a complete request head this long after connecting or its last response is disconnected."""

_BAD_REQUEST = "The request violates RFC 9112, and the connection is closed."
_BAD_REQUEST_CAUSE = "Its first line, a header field or its body is malformed, or it does not have exactly one Host."
_BAD_HANDSHAKE_CAUSE = "The WebSocket handshake has too many header fields, or one that is too long."
_BAD_REQUEST_HEADERS = {
    "connection": "close",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
_log = logging.getLogger(__name__)


class _BackpressureMixin(asyncio.Protocol):
    """Aborts a connection whose write buffer stays full."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _stall_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Start the stall timer: the write buffer is full."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the stall timer: the write buffer was drained."""
        self._cancel_stall_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection is closed."""
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class HttpProtocol(_BackpressureMixin, H11Protocol):
    """An HTTP connection. Invalid HTTP gets an error response in the usual format.

    uvicorn waits for a request head without limit: the first byte cancels its keep-alive timer.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn: FramedConnection = FramedConnection()
        self.app_state = {**self.app_state, "abort": self.abort}
        assert isinstance(self.server_state, PortState)
        self._unauthenticated_connections = self.server_state.unauthenticated_connections

    @property
    def is_authenticated(self) -> bool:
        """Whether a request of an authenticated caller, or of any caller of a server without tokens, is in progress."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        caller = self.scope.get("state", {}).get("caller")
        return caller is not None and caller.principal is not None

    def abort(self) -> None:
        """Close it immediately."""
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Register a new connection."""
        super().connection_made(transport)
        self._update_head_timer()
        self._unauthenticated_connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Process data and update the head timer."""
        super().data_received(data)
        self._update_head_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request head."""
        super().on_response_complete()
        self._update_head_timer()
        if not self.transport.is_closing():
            self._unauthenticated_connections.add(self)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Switch the connection to the WebSocket protocol."""
        self._unauthenticated_connections.remove(self)
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection is closed."""
        self._cancel_head_timer()
        self._unauthenticated_connections.remove(self)
        super().connection_lost(exc)

    def _update_head_timer(self) -> None:
        # DONE: the response was sent while the request body is still arriving.
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        """Close the connection unless it is still sending a response; STALL_TIMEOUT_SECONDS limits that."""
        self._head_timer = None
        if self.transport.get_write_buffer_size():
            self._update_head_timer()
        else:
            self.transport.abort()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Respond with 400, unless a response has started, and close. `msg` is uvicorn's own text and is not used."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            response = _bad_request_response(self.conn.framing_error or _BAD_REQUEST_CAUSE, self.client)
            head = h11.Response(status_code=400, headers=response.raw_headers, reason=reason_phrase(400).encode())
            body = () if self._is_answering_head_request() else (h11.Data(data=bytes(response.body)),)
            for event in (head, *body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # its response would follow the final one
        self.transport.close()

    def _is_answering_head_request(self) -> bool:
        return self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"


class WebSocketProtocol(_BackpressureMixin, WebSocketsSansIOProtocol):
    """A WebSocket connection.

    A response that rejects the handshake completes it; uvicorn logs that as an application error. Only the latest ping
    of a client that does not read gets a pong (RFC 6455 §5.5.3); uvicorn buffers all pongs.
    """

    _pending_pong = b""

    def data_received(self, data: bytes) -> None:
        """Process data. Respond with 400 to a handshake that the library cannot parse; uvicorn never responds to it."""
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.write(_bad_handshake_response(self.client))
            self.transport.close()

    async def send(self, message: Any) -> None:
        """Send a message, and mark a rejected handshake as complete. Return when the client has read most of it."""
        await super().send(message)
        if message["type"] == "websocket.send":
            await self.writable.wait()
        self.handshake_complete = self.handshake_complete or (self.initial_response is not None and self.close_sent)

    def handle_ping(self) -> None:
        """Send the pong now, or once the client reads again."""
        if self.writable.is_set():
            super().handle_ping()
        elif pongs := self.conn.data_to_send():  # the pongs to all pings that arrived in one read
            self._pending_pong = pongs[-1]

    def resume_writing(self) -> None:
        """Send the pending pong: the write buffer was drained."""
        super().resume_writing()
        pong, self._pending_pong = self._pending_pong, b""
        self.transport.write(pong)


def _bad_request_response(cause: str, client: tuple[str, int | None] | None) -> Response:
    connection = HTTPConnection({"type": "http", "path": "", "headers": []})
    fields = {"status": 400, "client": client and client[0], "request_id": get_request_id(connection)}
    _log.info("Rejected a malformed HTTP request", extra=fields)
    return problem_response(connection, 400, "bad_request", f"{_BAD_REQUEST} {cause}", headers=_BAD_REQUEST_HEADERS)


def _bad_handshake_response(client: tuple[str, int | None] | None) -> bytes:
    response = _bad_request_response(_BAD_HANDSHAKE_CAUSE, client)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return f"HTTP/1.1 400 {reason_phrase(400)}\r\n".encode() + head + b"\r\n" + bytes(response.body)
