"""The guard before every route, also before the handshakes of WebSockets."""

import logging
import time
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import urlencode

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.auth.authenticator import STREAM_PROTOCOL, Guard, Refusal, Visitor, without_token
from sandbox.api.responses import problem
from sandbox.api.streaming import fair_share
from sandbox.system.log_context import TOKEN_ID

RECHECK_SECONDS = 5.0
"""A stream tells and takes nothing more this long after its token was revoked or has expired."""

_CONTENT = frozenset({"http.response.body", "websocket.send"})
_LEAVE: Message = {"type": "websocket.close", "code": 1008, "reason": "The token is not good any more."}
_LEFT: Message = {"type": "websocket.disconnect", "code": 1008}
_log = logging.getLogger(__name__)


class VisitorUnknownError(OSError):
    """The visitor is not known any more; an OSError, as servers raise for a client that is gone."""


class Doorkeeper:
    """Lets requests in, or answers them with 401, 403 or 429. Routes learn from `visitor_of` who came."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        found = self._guard.admit(connection)
        # Not only where there is one: the context may be that of an earlier request on this connection.
        TOKEN_ID.set((found.principal.id or None) if found.principal is not None else None)
        if isinstance(found, Refusal):
            await _answer(connection, found)(scope, receive, send)
            return
        scope.setdefault("state", {})["visitor"] = found
        fair_share.use(self._guard.share_of(found))
        if scope.get("subprotocols"):
            scope, send = _agreeing(scope, send)
        with suppress(VisitorUnknownError), self._guard.answering(found):
            await self._app(scope, *self._watching(found, scope["type"], receive, _in_turn(send)))

    def _watching(self, visitor: Visitor, kind: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Pass on as long as the visitor is known; then break off as if the client had gone."""
        checked_at, has_left = time.monotonic(), False

        def is_unknown() -> bool:
            nonlocal checked_at
            now = time.monotonic()
            if has_left or now - checked_at < RECHECK_SECONDS:
                return has_left
            checked_at = now
            return not self._guard.still_knows(visitor)

        async def dismiss() -> None:
            nonlocal has_left
            if has_left:
                return
            has_left = True
            _log.info("An answer was broken off: the token or the session is not good any more")
            if kind == "websocket":
                await send(_LEAVE)

        async def receive_watched() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and is_unknown():
                await dismiss()
                return _LEFT
            return message

        async def send_watched(message: Message) -> None:
            if has_left or (message["type"] in _CONTENT and is_unknown()):
                await dismiss()
                raise VisitorUnknownError
            await send(message)

        return receive_watched, send_watched


def _in_turn(send: Send) -> Send:
    """What is sent waits for its turn within the client's share of the event loop."""

    async def send_in_turn(message: Message) -> None:
        if message["type"] in _CONTENT:
            await fair_share.take(len(message.get("body") or message.get("text") or message.get("bytes") or b""))
        await send(message)

    return send_in_turn


def _answer(connection: HTTPConnection, refusal: Refusal) -> Response:
    """People at a browser are led to where they can show their token; everybody else is told."""
    if refusal.status == HTTPStatus.UNAUTHORIZED and _is_page(connection):
        back = urlencode({"to": connection.url.path + ("?" + connection.url.query if connection.url.query else "")})
        return RedirectResponse(f"{paths.SIGN_IN}?{back}", 303, headers={"vary": "accept"})
    return problem(connection, refusal.status, refusal.code, refusal.message, headers=refusal.headers)


def _is_page(connection: HTTPConnection) -> bool:
    scope = connection.scope
    is_read = scope["type"] == "http" and scope["method"] == "GET"
    return is_read and wants_page(connection) and not scope["path"].startswith("/api/")


def wants_page(connection: HTTPConnection) -> bool:
    """Whether a browser asks for something to show, rather than a program for data."""
    return "text/html" in connection.headers.get("accept", "").lower()


def visitor_of(connection: HTTPConnection) -> Visitor:
    """Who came in with this request."""
    visitor = connection.scope["state"]["visitor"]
    assert isinstance(visitor, Visitor)
    return visitor


def _agreeing(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """The handshake without the token, answered with the protocol that the client offered beside it."""
    protocols = without_token(scope["subprotocols"])

    async def send_agreed(message: Message) -> None:
        if message["type"] == "websocket.accept" and STREAM_PROTOCOL in protocols:
            message = {**message, "subprotocol": message.get("subprotocol") or STREAM_PROTOCOL}
        await send(message)

    return {**scope, "subprotocols": protocols}, send_agreed
