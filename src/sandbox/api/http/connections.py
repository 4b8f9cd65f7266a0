"""uvicorn protocols with limits for clients that do not read responses or do not finish their requests."""

import asyncio
import logging
import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import h11
from starlette.requests import HTTPConnection
from starlette.responses import Response
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import InvalidState
from websockets.frames import CloseCode, Frame

from sandbox.api.http.request_framing import FramedConnection
from sandbox.api.responses import get_request_id, problem_response, reason_phrase
from sandbox.primitives.fair_client_shares import FairShare

UNAUTHENTICATED_CONNECTIONS_MAX = 1024
"""Maximum number of connections per port without an authenticated request; another connection closes the oldest.

Idle connections whose last request was authenticated have a separate limit with this value.
"""

_DESCRIPTORS_DIVISOR = 8
"""Divisor of the file descriptor limit: on each port, unauthenticated connections may use 1/8 of the descriptors.

Idle connections of authenticated clients may use another 1/8.
"""

STALL_TIMEOUT_SECONDS = 600.0
"""A client that does not read pending data for this long is disconnected."""

HEAD_TIMEOUT_SECONDS = 30.0
"""A client is disconnected if its request head is incomplete this long after connecting or after its last response."""

_PARTS_CHARGE_BYTES = 28 * 1024
"""Bytes charged to a client's share of the event loop for each group of parsed parts, whatever their length."""

_HEAD_CHARGE_BYTES = 4 * 1024
"""Bytes charged to the share of the event loop for a request head that is not costly."""

_REJECTION_CHARGE_BYTES = 16 * 1024
"""Bytes charged to the rejections' share of the event loop for each response to a malformed request."""

_FRAMES_BYTES_PER_STEP = 256
"""Number of bytes of WebSocket frames that are parsed in one step. A client's shortest frame is 6 bytes long."""

MORE_TEXT = "sandbox.more_text"
"""Key in a `websocket.send` message: whether the next message continues this text. ASGI does not define fragments."""

_FRAGMENTS_MAX = 64
"""Maximum number of unjoined fragments of a WebSocket message, because even an empty fragment uses memory."""

_BAD_REQUEST = "The request violates RFC 9112, and the connection is closed."
_BAD_REQUEST_CAUSE = "The first line, a header field or the body is malformed, or Host is missing or repeated."
_BAD_HANDSHAKE_CAUSE = "The WebSocket handshake has too many header fields, or one that is too long."
_BAD_REQUEST_HEADERS = {
    "connection": "close",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}
_log = logging.getLogger(__name__)


class ClosableConnections:
    """Connections that may be closed, ordered by when they were accepted or last got a response.

    Their number is limited, because each uses a file descriptor.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[HttpProtocol, None] = OrderedDict()

    def add(self, connection: "HttpProtocol") -> None:
        """Add a connection at the end, or move it there after its response. Close the oldest ones beyond the limit.

        Connections with an authenticated request in progress are not closed, only removed.
        """
        self._waiting[connection] = None
        self._waiting.move_to_end(connection)
        while len(self._waiting) > self._limit:
            oldest, _ = self._waiting.popitem(last=False)
            if not oldest.has_authenticated_request:
                oldest.abort()

    def remove(self, connection: "HttpProtocol") -> None:
        """Remove the connection; do nothing if it was not added."""
        self._waiting.pop(connection, None)


class PortState(ServerState):
    """State shared by the connections of one port.

    rejection_share: the share of the event loop for responses to malformed requests.
    head_share: the share for request heads of new connections to all ports of the server.
    idle_connections: connections whose last request was authenticated. They are counted separately, so that clients
    without a token cannot cause them to be closed.
    """

    def __init__(self, head_share: FairShare) -> None:
        super().__init__()
        self.rejection_share = FairShare()
        self.head_share = head_share
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = (
            UNAUTHENTICATED_CONNECTIONS_MAX
            if soft == resource.RLIM_INFINITY
            else min(UNAUTHENTICATED_CONNECTIONS_MAX, soft // _DESCRIPTORS_DIVISOR)
        )
        self.unauthenticated_connections = ClosableConnections(limit)
        self.idle_connections = ClosableConnections(limit)


class _BackpressureMixin(asyncio.Protocol):
    """Aborts a connection if its write buffer stays full for STALL_TIMEOUT_SECONDS."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _stall_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Start the stall timer, because the write buffer is full."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the stall timer, because the write buffer has been drained."""
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


class _Flow(FlowControl):
    """Flow control that resumes reading only after all received data has been parsed."""

    is_held = False

    def resume_reading(self) -> None:
        """Resume reading unless `is_held` is set."""
        if not self.is_held:
            super().resume_reading()


class HttpProtocol(_BackpressureMixin, H11Protocol):
    """An HTTP connection. A malformed request gets an error response in the API's format.

    The head timer is needed because uvicorn waits indefinitely for a request head: the first byte cancels its
    keep-alive timer.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _parts_reader: asyncio.Task[None] | None = None
    _rejection: asyncio.Task[None] | None = None
    flow: _Flow

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn: FramedConnection = FramedConnection()
        self.conn.hold_heads(are_all_held=True)  # until a request has been authenticated
        self.app_state = {**self.app_state, "abort": self.abort}
        assert isinstance(self.server_state, PortState)
        self._unauthenticated_connections = self.server_state.unauthenticated_connections
        self._idle_connections = self.server_state.idle_connections
        self._rejection_share = self.server_state.rejection_share
        self._head_share = self.server_state.head_share

    @property
    def has_authenticated_request(self) -> bool:
        """Whether a request from an authenticated caller (any caller if there are no tokens) is in progress."""
        return self.cycle is not None and not self.cycle.response_complete and self._has_authenticated_caller()

    def _has_authenticated_caller(self) -> bool:
        caller = self.scope.get("state", {}).get("caller")
        return caller is not None and caller.principal is not None

    def abort(self) -> None:
        """Close the connection immediately."""
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Register a new connection."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._update_head_timer()
        self._unauthenticated_connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Process received data and update the head timer."""
        super().data_received(data)
        self._update_head_timer()

    def handle_events(self) -> None:
        """Handle received data. Held heads and many chunks of a body wait for the share of their client."""
        super().handle_events()
        self.flow.is_held = self.conn.is_paused
        if self.conn.is_paused and self._parts_reader is None:
            self._parts_reader = self.loop.create_task(self._read_parts())

    async def _read_parts(self) -> None:
        while self.conn.is_paused:
            share = _share_of(self.scope, self._head_share)
            await share.wait_for_turn(_HEAD_CHARGE_BYTES if self.conn.is_next_part_cheap else _PARTS_CHARGE_BYTES)
            if self.transport.is_closing():
                break
            self.flow.is_held = False
            if self.cycle is None or self.cycle.response_complete or len(self.cycle.body) <= HIGH_WATER_LIMIT:
                self.flow.resume_reading()
            self.conn.resume()
            self.handle_events()
            self._update_head_timer()
        self._parts_reader = None

    def on_response_complete(self) -> None:
        """Start the head timer for the next request."""
        is_authenticated = self._has_authenticated_caller()
        group = self._idle_connections if is_authenticated else self._unauthenticated_connections
        self.conn.hold_heads(are_all_held=not is_authenticated)
        super().on_response_complete()  # may begin the next request
        self._update_head_timer()
        if not self.transport.is_closing():
            self._remove_closable()
            group.add(self)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Switch the connection to the WebSocket protocol, which requires authentication."""
        self._remove_closable()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after the connection is closed."""
        self._cancel_head_timer()
        self._remove_closable()
        super().connection_lost(exc)

    def _remove_closable(self) -> None:
        self._unauthenticated_connections.remove(self)
        self._idle_connections.remove(self)

    def _update_head_timer(self) -> None:
        # our_state is DONE: the response has been sent, but the request body is still arriving.
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._cancel_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        """Close the connection. If a response is still being sent, wait for it, but at most STALL_TIMEOUT_SECONDS."""
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
        """Respond with 400 unless a response has started, then close. uvicorn's text in `msg` is not used."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # otherwise the app's response would replace or follow this one
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.close()
        elif self._rejection is None:
            self.transport.pause_reading()
            self._rejection = self.loop.create_task(self._reject())

    async def _reject(self) -> None:
        await self._rejection_share.wait_for_turn(_REJECTION_CHARGE_BYTES)
        if self.transport.is_closing():
            return
        response = _bad_request_response(self.conn.framing_error or _BAD_REQUEST_CAUSE, self.client)
        head = h11.Response(status_code=400, headers=response.raw_headers, reason=reason_phrase(400).encode())
        body = () if self._is_answering_head_request() else (h11.Data(data=bytes(response.body)),)
        for event in (head, *body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _is_answering_head_request(self) -> bool:
        return self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"


class WebSocketProtocol(_BackpressureMixin, WebSocketsSansIOProtocol):
    """A WebSocket connection.

    It differs from uvicorn's class in five ways. A response that rejects the handshake also completes the handshake,
    whereas uvicorn logs an application error. A client that does not read gets a pong only for its latest ping (RFC
    6455 §5.5.3), whereas uvicorn buffers all pongs. The fragments of a message are joined as they arrive. A text
    message that is not valid UTF-8 only ends the connection, whereas uvicorn also logs a server error. A text message
    can be sent in fragments.
    """

    _pending_pong = b""
    _parser: asyncio.Task[None] | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._unparsed = bytearray()
        self._changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Process the handshake, and buffer frames until the client's share of the event loop allows parsing.

        A handshake that the library cannot parse gets a 400; uvicorn would not respond to it.
        """
        if self.handshake_initiated:
            self._unparsed += data
            self.transport.pause_reading()
            self._parser = self._parser or self.loop.create_task(self._parse_frames())
            return
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.write(_bad_handshake_response(self.client))
            self.transport.close()

    async def _parse_frames(self) -> None:
        """Parse the buffered frames, a few at a time, once the handshake is complete."""
        await self._wait_until(lambda: self.handshake_complete)
        while self._unparsed and not self.transport.is_closing():
            await _share_of(self.scope, FairShare()).wait_for_turn(_PARTS_CHARGE_BYTES)
            frames, self._unparsed = self._unparsed[:_FRAMES_BYTES_PER_STEP], self._unparsed[_FRAMES_BYTES_PER_STEP:]
            super().data_received(bytes(frames))
            await self._wait_until(lambda: self.queue.empty() or self.close_sent)
        self._parser = None
        self.transport.resume_reading()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.disconnected:
            self._changed.clear()
            await self._changed.wait()

    async def receive(self) -> Any:
        """Return the next message. The frame parser resumes reading once the buffer is empty."""
        self.read_paused = False
        message = await self.queue.get()
        self._changed.set()
        return message

    async def send(self, message: Any) -> None:
        """Send a message; return when the client has read most of it. Mark a rejected handshake as complete.

        Once the protocol has closed the connection, because the client closed it or sent an invalid frame, another
        close message has no effect. Raises ClientDisconnected for any other message.
        """
        if self.close_sent:
            if message["type"] != "websocket.close":
                raise ClientDisconnected
            return
        is_fragment = message.get(MORE_TEXT, False) or self.conn.expect_continuation_frame
        if is_fragment and message["type"] == "websocket.send":
            await self._send_fragment(message["text"], has_more=message[MORE_TEXT])
        else:
            await super().send(message)
        if message["type"] == "websocket.send":
            await self.writable.wait()
            return
        self.handshake_complete = self.handshake_complete or (self.initial_response is not None and self.close_sent)
        self._changed.set()

    async def _send_fragment(self, text: str, *, has_more: bool) -> None:
        await self.writable.wait()
        if self.disconnected:
            raise ClientDisconnected
        send = self.conn.send_continuation if self.conn.expect_continuation_frame else self.conn.send_text
        try:
            send(text.encode(), fin=not has_more)
        except InvalidState:
            raise ClientDisconnected from None
        self.transport.write(b"".join(self.conn.data_to_send()))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the parser after the connection is closed."""
        super().connection_lost(exc)
        self._unparsed.clear()
        self._changed.set()

    def handle_cont(self, event: Frame) -> None:
        """Add a fragment to the message."""
        super().handle_cont(event)
        if len(self.frames) > _FRAGMENTS_MAX:
            self.frames = [b"".join(self.frames)]

    def send_receive_event_to_app(self) -> None:
        """Pass on a message, unless it is a text message that is not valid UTF-8."""
        if self.curr_msg_data_type == "bytes" or self.close_sent or _is_utf8(b"".join(self.frames)):
            super().send_receive_event_to_app()
        else:
            self.conn.send_close(CloseCode.INVALID_DATA)
            self.handle_parser_exception()

    def handle_ping(self) -> None:
        """Send the pong now, or once the client reads again."""
        if self.writable.is_set():
            super().handle_ping()
        elif pongs := self.conn.data_to_send():  # the pongs for all pings that arrived in one read
            self._pending_pong = pongs[-1]

    def resume_writing(self) -> None:
        """Send the pending pong, because the write buffer has been drained."""
        super().resume_writing()
        pong, self._pending_pong = self._pending_pong, b""
        self.transport.write(pong)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _share_of(scope: Any, default: FairShare) -> FairShare:
    """Return the client's share of the event loop; the default one until the request has been authenticated."""
    share = scope and scope["state"].get("share")
    return share if isinstance(share, FairShare) else default


def _bad_request_response(cause: str, client: tuple[str, int | None] | None) -> Response:
    connection = HTTPConnection({"type": "http", "path": "", "headers": []})
    fields = {"status": 400, "client": client and client[0], "request_id": get_request_id(connection)}
    _log.info("Rejected a malformed HTTP request", extra=fields)
    return problem_response(connection, 400, "bad_request", f"{_BAD_REQUEST} {cause}", headers=_BAD_REQUEST_HEADERS)


def _bad_handshake_response(client: tuple[str, int | None] | None) -> bytes:
    response = _bad_request_response(_BAD_HANDSHAKE_CAUSE, client)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return f"HTTP/1.1 400 {reason_phrase(400)}\r\n".encode() + head + b"\r\n" + bytes(response.body)
