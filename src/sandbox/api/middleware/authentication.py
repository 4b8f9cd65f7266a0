"""Authentication middleware for all routes and WebSocket handshakes."""

import logging
import sys
import time
from http import HTTPStatus
from urllib.parse import urlencode

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.auth.credentials import STREAM_PROTOCOL, strip_token_protocol
from sandbox.api.auth.request_admission import Caller, Denied, RequestAdmission, unauthorized
from sandbox.api.json_responses import problem_response
from sandbox.api.middleware.response_memory_limit import respond_within_memory
from sandbox.api.request_parsing import accepts_html
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import MemoryShare
from sandbox.primitives.log_context import TOKEN_ID

RECHECK_INTERVAL_SECONDS = 5.0
"""Maximum time that a stream continues after its token is revoked or expires."""

_REQUEST_CHARGE_BYTES = 16 * 1024
"""Bytes charged to the client's share of the event loop for a request, even if it is rejected."""

_RESPONSE_START = "http.response.start"
_CHECKED_TYPES = frozenset({_RESPONSE_START, "http.response.body", "websocket.send"})
_CLOSE_MESSAGE: Message = {"type": "websocket.close", "code": 1008, "reason": "The token is no longer valid."}
_DISCONNECT_MESSAGE: Message = {"type": "websocket.disconnect", "code": 1008}
_log = logging.getLogger(__name__)


class CredentialsRevokedError(OSError):
    """The caller's credentials are no longer valid.

    It is an OSError, like the error that servers raise for a closed connection.
    """


class AuthenticationMiddleware:
    """Passes requests on, or rejects them with 401, 403 or 429.

    `get_caller` returns the caller of a request that was passed on.
    """

    def __init__(self, app: ASGIApp, admission: RequestAdmission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or reject it."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        result = self._admission.admit(connection)
        # Always set the context variable: with keep-alive, it may still hold the previous request's token.
        TOKEN_ID.set((result.principal.id or None) if result.principal is not None else None)
        share = self._admission.client_limits.fair_share_of(result.principal)
        fair_client_shares.set_current_share(share)
        scope.setdefault("state", {})["share"] = share
        await share.wait_for_turn(_REQUEST_CHARGE_BYTES)
        if isinstance(result, Denied):
            await _denied_response(connection, result)(scope, receive, send)
            return
        scope["state"]["caller"] = result
        memory = share.memory if result.principal is not None else MemoryShare(sys.maxsize)
        if scope.get("subprotocols"):
            scope, send = _with_subprotocol(scope, send)
        channel = _CheckedChannel(result, scope["type"], (receive, send), self._admission)
        try:
            with self._admission.client_limits.count_request(result.principal):
                await respond_within_memory(self._app, scope, channel.receive, channel.send, memory)
        except CredentialsRevokedError:
            if scope["type"] == "http" and not channel.has_response:
                await _denied_response(connection, unauthorized(has_invalid_credentials=True))(scope, receive, send)


class _CheckedChannel:
    """Forwards the messages on one connection.

    Once the credentials are revoked, the app gets the same messages and errors as after a disconnection.
    """

    def __init__(self, caller: Caller, kind: str, channels: tuple[Receive, Send], admission: RequestAdmission) -> None:
        self.has_response = False
        self._caller = caller
        self._kind = kind
        self._receive, self._send = channels
        self._admission = admission
        self._checked_at = time.monotonic()
        self._is_cut_off = False

    async def receive(self) -> Message:
        """Return the next message, or a disconnection."""
        message = await self._receive()
        if message["type"] == "websocket.receive" and self._is_revoked():
            await self._cut_off()
            return _DISCONNECT_MESSAGE
        return message

    async def send(self, message: Message) -> None:
        """Send a message. Raises CredentialsRevokedError."""
        if self._is_cut_off or (message["type"] in _CHECKED_TYPES and self._is_revoked()):
            await self._cut_off()
            raise CredentialsRevokedError
        self.has_response |= message["type"] == _RESPONSE_START
        await self._send(message)

    def _is_revoked(self) -> bool:
        now = time.monotonic()
        if self._is_cut_off or now - self._checked_at < RECHECK_INTERVAL_SECONDS:
            return self._is_cut_off
        self._checked_at = now
        return not self._admission.is_still_valid(self._caller)

    async def _cut_off(self) -> None:
        if self._is_cut_off:
            return
        self._is_cut_off = True
        _log.info("A response was cut off: the token or session is no longer valid")
        if self._kind == "websocket":
            await self._send(_CLOSE_MESSAGE)


def _denied_response(connection: HTTPConnection, denied: Denied) -> Response:
    """Redirect a 401 for a page to the sign-in page; return every other denial as an error."""
    if denied.status == HTTPStatus.UNAUTHORIZED and _is_page_request(connection):
        back = urlencode({"to": connection.url.path + ("?" + connection.url.query if connection.url.query else "")})
        return RedirectResponse(f"{paths.SIGN_IN}?{back}", 303, headers={"vary": "accept"})
    return problem_response(connection, denied.status, denied.code, denied.message, headers=denied.headers)


def _is_page_request(connection: HTTPConnection) -> bool:
    scope = connection.scope
    is_get = scope["type"] == "http" and scope["method"] == "GET"
    return is_get and accepts_html(connection) and not scope["path"].startswith("/api/")


def get_caller(connection: HTTPConnection) -> Caller:
    """Return the caller of this request."""
    caller = connection.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


def require_valid_credentials(connection: HTTPConnection, admission: RequestAdmission) -> None:
    """Check the caller's credentials again before a change is made.

    They may have been revoked while the request body was arriving. Raises CredentialsRevokedError.
    """
    if not admission.is_still_valid(get_caller(connection)):
        raise CredentialsRevokedError


def _with_subprotocol(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """Remove the token from the offered subprotocols and accept with STREAM_PROTOCOL if the client offered it."""
    protocols = strip_token_protocol(scope["subprotocols"])

    async def send_agreed(message: Message) -> None:
        if message["type"] == "websocket.accept" and STREAM_PROTOCOL in protocols:
            message = {**message, "subprotocol": message.get("subprotocol") or STREAM_PROTOCOL}
        await send(message)

    return {**scope, "subprotocols": protocols}, send_agreed
