"""uvicorn's connections, with bounds on what a client that takes nothing can cost."""

import asyncio
import logging
from typing import Any

import h11
from starlette.requests import HTTPConnection
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from sandbox.api.http.connection_limits import DoorState
from sandbox.api.http.framing import FramedConnection
from sandbox.api.middleware.response_headers import get_request_id
from sandbox.api.responses import problem_response, reason_phrase

STALL_TIMEOUT_SECONDS = 600.0
"""A client that does not take what is ready for it loses its connection."""

HEAD_TIMEOUT_SECONDS = 30.0
"""A client whose request's head is not whole by then, from its connecting or its last answer on, is cut off."""

_BAD_REQUEST = "This is no HTTP request as RFC 9112 has it, and the connection ends here."
_BAD_REQUEST_CAUSE = "Its first line, a header field or its body cannot be read, or it has no Host or several."
_BAD_HANDSHAKE_CAUSE = "The WebSocket handshake has too many header fields, or one that is too long."
_BAD_REQUEST_HEADERS = {
    "connection": "close",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
_log = logging.getLogger(__name__)


class _BackpressureMixin(asyncio.Protocol):
    """Ends a connection whose buffer stays full."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _stall_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The client takes less than comes."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken what was ready."""
        self._cancel_stall_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class HttpProtocol(_BackpressureMixin, H11Protocol):
    """A connection that speaks HTTP. Who does not is told so in the shape of every other error.

    The original waits for a head without a bound: its timer of idle connections ends with the first byte.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn: FramedConnection = FramedConnection()
        assert isinstance(self.server_state, DoorState)
        self._strangers = self.server_state.strangers

    @property
    def is_known(self) -> bool:
        """Whether somebody who was let in by name, or the operator of a server without tokens, is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        visitor = self.scope.get("state", {}).get("visitor")
        return visitor is not None and visitor.principal is not None

    def cut(self) -> None:
        """End it at once."""
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self._update_head_timer()
        self._strangers.add(self)

    def data_received(self, data: bytes) -> None:
        """As the original does."""
        super().data_received(data)
        self._update_head_timer()

    def on_response_complete(self) -> None:
        """An answer has ended; the next head may come."""
        super().on_response_complete()
        self._update_head_timer()
        if not self.transport.is_closing():
            self._strangers.add(self)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """As the original does."""
        self._strangers.remove(self)
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._cancel_head_timer()
        self._strangers.remove(self)
        super().connection_lost(exc)

    def _update_head_timer(self) -> None:
        # DONE: the request has its answer, and its body is still coming.
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        """Who still takes an answer has asked; STALLED_SECONDS bounds that."""
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
        """Answer, unless an answer has begun already, and close. `msg` is the original's."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            answer = _bad_request_response(self.conn.framing_error or _BAD_REQUEST_CAUSE, self.client)
            head = h11.Response(status_code=400, headers=answer.raw_headers, reason=reason_phrase(400).encode())
            body = () if self._is_answering_head_request() else (h11.Data(data=bytes(answer.body)),)
            for event in (head, *body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # its answer would come behind the last one that there can be
        self.transport.close()

    def _is_answering_head_request(self) -> bool:
        return self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"


class WebSocketProtocol(_BackpressureMixin, WebSocketsSansIOProtocol):
    """A connection that speaks WebSocket.

    An answer that refuses the handshake counts as its end; the original calls it an error of the application's.
    Who takes nothing is owed the answer to the latest ping only (RFC 6455 §5.5.3); the original keeps all of them.
    """

    _pending_pong = b""

    def data_received(self, data: bytes) -> None:
        """As the original does, which never answers a handshake that its library cannot read."""
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.write(_bad_handshake_response(self.client))
            self.transport.close()

    async def send(self, message: Any) -> None:
        """As the original does."""
        await super().send(message)
        self.handshake_complete = self.handshake_complete or (self.initial_response is not None and self.close_sent)

    def handle_ping(self) -> None:
        """Answer now, or when the client takes something again."""
        if self.writable.is_set():
            super().handle_ping()
        elif pongs := self.conn.data_to_send():  # of all pings that came in one piece
            self._pending_pong = pongs[-1]

    def resume_writing(self) -> None:
        """It has taken what was ready."""
        super().resume_writing()
        owed, self._pending_pong = self._pending_pong, b""
        self.transport.write(owed)


def _bad_request_response(cause: str, client: tuple[str, int | None] | None) -> Response:
    connection = HTTPConnection({"type": "http", "path": "", "headers": []})
    fields = {"status": 400, "client": client and client[0], "request_id": get_request_id(connection)}
    _log.info("Refused what is no HTTP", extra=fields)
    return problem_response(connection, 400, "bad_request", f"{_BAD_REQUEST} {cause}", headers=_BAD_REQUEST_HEADERS)


def _bad_handshake_response(client: tuple[str, int | None] | None) -> bytes:
    answer = _bad_request_response(_BAD_HANDSHAKE_CAUSE, client)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
    return f"HTTP/1.1 400 {reason_phrase(400)}\r\n".encode() + head + b"\r\n" + bytes(answer.body)
