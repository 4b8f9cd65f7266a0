"""Authentication middleware for all routes and WebSocket handshakes."""

import logging
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import urlencode

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.auth.authenticator import STREAM_PROTOCOL, Authenticator, Caller, Denied, strip_token_protocol
from sandbox.api.middleware.response_memory import respond_within_memory
from sandbox.api.responses import problem_response
from sandbox.system import fair_share
from sandbox.system.log_context import TOKEN_ID
from sandbox.system.memory_share import MemoryShare

RECHECK_SECONDS = 5.0
"""How long a stream may continue after its token was revoked or has expired."""

_REQUEST_BYTES = 16 * 1024
"""Bytes charged to the client's share for a request, even if it is rejected."""

_CONTENT = frozenset({"http.response.body", "websocket.send"})
_CLOSE_MESSAGE: Message = {"type": "websocket.close", "code": 1008, "reason": "The token is no longer valid."}
_DISCONNECT_MESSAGE: Message = {"type": "websocket.disconnect", "code": 1008}
_log = logging.getLogger(__name__)


class CredentialsRevokedError(OSError):
    """The caller's credentials are no longer valid.

    An OSError, like the one that servers raise for a closed connection.
    """


class AuthenticationMiddleware:
    """Passes requests on, or rejects them with 401, 403 or 429. `get_caller` returns the caller of a passed request."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on or reject it."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        result = self._authenticator.authenticate(connection)
        # Always set: with keep-alive the context var may hold the previous request's token.
        TOKEN_ID.set((result.principal.id or None) if result.principal is not None else None)
        share = self._authenticator.share_of(result.principal)
        fair_share.set_current_share(share)
        scope.setdefault("state", {})["share"] = share
        await share.acquire(_REQUEST_BYTES)
        if isinstance(result, Denied):
            await _denied_response(connection, result)(scope, receive, send)
            return
        scope["state"]["caller"] = result
        memory = share.memory if result.principal is not None else MemoryShare(sys.maxsize)
        if scope.get("subprotocols"):
            scope, send = _with_subprotocol(scope, send)
        with suppress(CredentialsRevokedError), self._authenticator.count_request(result):
            await respond_within_memory(
                self._app, scope, *self._with_rechecks(result, scope["type"], receive, send), memory
            )

    def _with_rechecks(self, caller: Caller, kind: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Wrap the channels so that revoked credentials end the connection, as if the client had disconnected."""
        checked_at, is_cut_off = time.monotonic(), False

        def is_revoked() -> bool:
            nonlocal checked_at
            now = time.monotonic()
            if is_cut_off or now - checked_at < RECHECK_SECONDS:
                return is_cut_off
            checked_at = now
            return not self._authenticator.is_still_valid(caller)

        async def disconnect() -> None:
            nonlocal is_cut_off
            if is_cut_off:
                return
            is_cut_off = True
            _log.info("A response was cut off: the token or session is no longer valid")
            if kind == "websocket":
                await send(_CLOSE_MESSAGE)

        async def receive_checked() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and is_revoked():
                await disconnect()
                return _DISCONNECT_MESSAGE
            return message

        async def send_checked(message: Message) -> None:
            if is_cut_off or (message["type"] in _CONTENT and is_revoked()):
                await disconnect()
                raise CredentialsRevokedError
            await send(message)

        return receive_checked, send_checked


def _denied_response(connection: HTTPConnection, denied: Denied) -> Response:
    """Redirect browsers to the sign-in page; send an error to all other clients."""
    if denied.status == HTTPStatus.UNAUTHORIZED and _is_page_request(connection):
        back = urlencode({"to": connection.url.path + ("?" + connection.url.query if connection.url.query else "")})
        return RedirectResponse(f"{paths.SIGN_IN}?{back}", 303, headers={"vary": "accept"})
    return problem_response(connection, denied.status, denied.code, denied.message, headers=denied.headers)


def _is_page_request(connection: HTTPConnection) -> bool:
    scope = connection.scope
    is_get = scope["type"] == "http" and scope["method"] == "GET"
    return is_get and accepts_html(connection) and not scope["path"].startswith("/api/")


def accepts_html(connection: HTTPConnection) -> bool:
    """Whether the client is a browser that requests a page, rather than a program that requests data."""
    return "text/html" in connection.headers.get("accept", "").lower()


def get_caller(connection: HTTPConnection) -> Caller:
    """Return the caller of this request."""
    caller = connection.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


def _with_subprotocol(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """Remove the token from the offered subprotocols and accept with STREAM_PROTOCOL if it was offered."""
    protocols = strip_token_protocol(scope["subprotocols"])

    async def send_agreed(message: Message) -> None:
        if message["type"] == "websocket.accept" and STREAM_PROTOCOL in protocols:
            message = {**message, "subprotocol": message.get("subprotocol") or STREAM_PROTOCOL}
        await send(message)

    return {**scope, "subprotocols": protocols}, send_agreed
