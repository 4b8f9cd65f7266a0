"""Authentication and authorization: the checks that admit or deny a request, and the middleware for all routes.

The checks cover the credentials, the role, the rate limit, and whether a page of another site forged the request.

A server without tokens listens on a loopback address, and any client that reaches the port is the operator. Therefore,
requests from pages of other sites are detected by `Host`, `Origin` and `Sec-Fetch-Site`. On a server with tokens, such
a page cannot forge a request that contains a token. But the page can trigger a request with a session cookie, so
`Origin` and `Sec-Fetch-Site` are still checked.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal
from urllib.parse import urlencode

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.client_limits import ClientLimits, respond_within_memory
from sandbox.api.request_parsing import accepts_html
from sandbox.api.responses import problem_response
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import Principal, Role, TokenStore
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import MemoryShare
from sandbox.primitives.log_context import TOKEN_ID

SESSION_COOKIE = "sandbox_session"
SESSION_SECONDS = 12 * 3600
"""Lifetime of a session; after that, the browser must present the token again."""

SESSIONS_MAX = 1000
"""Maximum number of open sessions; opening another one closes the oldest."""

SESSIONS_PER_TOKEN_MAX = 20
"""Maximum number of open sessions per token; opening another one closes that token's oldest session.

This way, the holder of one token cannot close the sessions of other tokens.
"""

_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Session:
    principal_id: str
    expires_at_seconds: float


class SessionStore:
    """Maps session cookies to principals. Only digests of cookies are stored."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def open(self, principal_id: str) -> str:
        """Open a session; return the value of its cookie."""
        own = [digest for digest, session in self._sessions.items() if session.principal_id == principal_id]
        if len(own) >= SESSIONS_PER_TOKEN_MAX:
            del self._sessions[own[0]]
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        self._sessions[_digest(secret)] = _Session(principal_id, self._monotonic() + SESSION_SECONDS)
        if len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return secret

    def find(self, secret: str) -> str | None:
        """Return the principal's id, or None if the session is unknown or expired."""
        session = self._sessions.get(_digest(secret))
        if session is None or session.expires_at_seconds <= self._monotonic():
            return None
        return session.principal_id

    def close(self, secret: str) -> None:
        """Close a session; do nothing if it is unknown."""
        self._sessions.pop(_digest(secret), None)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


BEARER_SUBPROTOCOL_PREFIX = "sandbox.bearer."
"""Prefix of a token that is sent as a WebSocket subprotocol, because pages cannot set headers on a WebSocket."""

WEBSOCKET_SUBPROTOCOL = "sandbox.v1"
"""The negotiated subprotocol. The server must select a subprotocol that the browser offered, but not the token."""

_CREDENTIALS_CHARACTERS_MAX = 512
_SESSION_COOKIE = re.compile(rf"(?:^|;)[ \t]*{SESSION_COOKIE}[ \t]*=([^;]*)")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials from a request. `value` is untrusted."""

    kind: Literal["token", "session"]
    value: str


def extract_credentials(connection: HTTPConnection) -> Credentials | None:
    """Return the credentials of a request; a token takes precedence over a cookie.

    Values that exceed the length limit are truncated and therefore invalid.
    """
    token = _bearer_token(connection.headers.get("authorization", "")) or _subprotocol_token(
        connection.scope.get("subprotocols", ())
    )
    if token is not None:
        return Credentials("token", token[:_CREDENTIALS_CHARACTERS_MAX])
    session = session_cookie(connection)
    return Credentials("session", session[:_CREDENTIALS_CHARACTERS_MAX]) if session else None


def session_cookie(connection: HTTPConnection) -> str | None:
    """Return the last session cookie. The other cookies, of which there may be thousands, are not parsed."""
    values = [value for line in connection.headers.getlist("cookie") for value in _SESSION_COOKIE.findall(line)]
    return values[-1].strip() if values else None


def strip_token_protocol(protocols: Iterable[str]) -> list[str]:
    """Return the offered subprotocols, except the token."""
    return [protocol for protocol in protocols if not protocol.startswith(BEARER_SUBPROTOCOL_PREFIX)]


def _bearer_token(header: str) -> str | None:
    scheme, _, token = header.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _subprotocol_token(protocols: Iterable[str]) -> str | None:
    return next(
        (
            name.removeprefix(BEARER_SUBPROTOCOL_PREFIX)
            for name in protocols
            if name.startswith(BEARER_SUBPROTOCOL_PREFIX)
        ),
        None,
    )


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ORIGIN_PATTERN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_SCHEME_PORTS = {"http": 80, "https": 443}
_DATA_DESTINATIONS = frozenset({"document", "empty"})
"""Fetch destinations for which all responses are allowed: `document` (navigation) and `empty` (fetch, EventSource)."""
_ASSET_DESTINATIONS = _DATA_DESTINATIONS | {"script", "style", "image", "worker"}


def check_host_and_origin(
    host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]
) -> str | None:
    """Return why a request with these headers is denied, or None if it is allowed.

    names: this server's host names.
    ports: the ports on which this server listens.
    """
    if host is None or _parse_origin(f"http://{host}", names) is None:
        return "The Host header names a different server; use this server's address or a name from server.host_names."
    return check_origin(host, origin, names=names, ports=ports)


def check_origin(host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]) -> str | None:
    """Return why a request from this origin is denied, or None if it is allowed.

    Non-browser clients send no `Origin`.
    """
    if origin is None or origin.lower() in {f"http://{host}".lower(), f"https://{host}".lower()}:
        return None
    parsed = _parse_origin(origin, names)
    if parsed is None or parsed[1] not in ports:
        return "The Origin header names a different site; send the request from this server's pages."
    return None


def check_fetch_site(method: str | None, headers: Mapping[str, str]) -> str | None:
    """Return why a request without `Origin` is denied, or None.

    Denies requests from pages of other sites, except when the user follows a link.
    """
    if "origin" in headers or headers.get("sec-fetch-site") not in {"cross-site", "same-site"}:
        return None
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    if method == "GET" and is_link:
        return None
    return "The Sec-Fetch-Site header names a different site; send the request from this server's pages."


def check_fetch_destination(destination: str | None, *, is_page_asset: bool) -> str | None:
    """Return why a browser must not load a resource for this `Sec-Fetch-Dest`, or None.

    Only the assets of the server's own pages may be executed, in a page or a worker, or used as style sheets. Other
    responses may contain text written by an agent. Non-browser clients do not send this header.
    """
    if destination is None or destination in (_ASSET_DESTINATIONS if is_page_asset else _DATA_DESTINATIONS):
        return None
    return "The Sec-Fetch-Dest header is for a script, style, frame or image; fetch or download this resource instead."


def _parse_origin(origin: str, names: Collection[str]) -> tuple[str, int] | None:
    """Return the host and port of an origin, or None if it is malformed or its host is not in `names`."""
    match = _ORIGIN_PATTERN.fullmatch(origin.lower())
    if match is None:
        return None
    name = match["name"].strip("[]")
    return (name, int(match["port"] or _SCHEME_PORTS[match["scheme"]])) if name in names else None


LOCAL_OPERATOR = Principal("", "local", Role.OPERATOR)
"""The principal of every client of a server without tokens."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OPERATOR_REQUIRED = "This token is read-only; use one with the operator role."
_TOKEN_HINT = (
    "Send a token as 'Authorization: Bearer …' (on the command line: sandbox login, --token or SANDBOX_TOKEN); "
    "the server's operator creates one with: sandbox token create"
)


@dataclass(frozen=True, slots=True)
class Denied:
    """The response to a denied request. principal: the authenticated principal, or None."""

    status: int
    code: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)
    principal: Principal | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of an allowed request.

    principal: None for a request to a public path without valid credentials.
    credentials: the valid credentials of the request; None if it has none or the server requires no token.
    """

    principal: Principal | None
    credentials: Credentials | None = None

    @property
    def is_operator(self) -> bool:
        """Whether the caller has the operator role."""
        return self.principal is not None and self.principal.role is Role.OPERATOR


class RequestAdmission:
    """Admits or denies each request to one server, on both of its ports."""

    def __init__(
        self, token_store: TokenStore, settings: ApiSettings, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.sessions = SessionStore(monotonic)
        self.client_limits = ClientLimits(settings.requests_per_minute, monotonic)
        self._token_store = token_store
        self._settings = settings
        self._host_names = LOOPBACK_NAMES | {name.lower() for name in settings.host_names}

    def requires_token(self) -> bool:
        """Return whether requests need a token: the settings require one, or there is a token."""
        return self._settings.requires_token or self._token_store.has_tokens

    def admit(self, connection: HTTPConnection) -> Caller | Denied:
        """Return the caller of an admitted request, or the response that denies the request."""
        credentials = extract_credentials(connection)
        principal = self._find_principal(credentials)
        requires_token = self.requires_token()
        # Deny before counting: cross-site requests must not use up the operator's rate limit.
        if denied := self._deny_cross_site(connection, credentials, requires_token=requires_token):
            return denied
        address = connection.client.host if connection.client is not None else None
        if wait_seconds := self.client_limits.take_request_or_wait_seconds(principal, address):
            return _rate_limited(wait_seconds, principal)
        if not requires_token:
            return Caller(LOCAL_OPERATOR)
        return _authorize(
            connection,
            Caller(principal, credentials if principal else None),
            has_invalid_credentials=credentials is not None,
        )

    def is_still_valid(self, caller: Caller) -> bool:
        """Return whether the caller's credentials are still valid and still have the same role."""
        if caller.principal is None:
            return True
        if caller.credentials is None:
            return not self.requires_token()
        is_open = caller.credentials.kind == "token" or self.sessions.find(caller.credentials.value) is not None
        current = self._token_store.find_principal(caller.principal.id)
        return is_open and current is not None and current.role is caller.principal.role

    def _find_principal(self, credentials: Credentials | None) -> Principal | None:
        if credentials is None:
            return None
        if credentials.kind == "token":
            return self._token_store.authenticate(credentials.value)
        principal_id = self.sessions.find(credentials.value)
        return self._token_store.find_principal(principal_id) if principal_id is not None else None

    def _deny_cross_site(
        self, connection: HTTPConnection, credentials: Credentials | None, *, requires_token: bool
    ) -> Denied | None:
        """Deny requests that a page of another site may have forged. Such a page can send a cookie, but no token."""
        if connection.scope["type"] == "http" and (denied := _deny_embedding(connection)):
            return denied
        has_cookie = credentials is not None and credentials.kind == "session"
        if requires_token and not has_cookie:
            return None
        check = check_origin if requires_token else check_host_and_origin
        host, origin = (connection.headers.get(name) for name in ("host", "origin"))
        reason = check(host, origin, names=self._host_names, ports=self._settings.ports) or check_fetch_site(
            connection.scope.get("method"), connection.headers
        )
        return Denied(403, code="forbidden", message=reason) if reason is not None else None


def _deny_embedding(connection: HTTPConnection) -> Denied | None:
    """Deny requests whose responses would be executed or embedded by a page, even by one of the server's own pages."""
    is_page_asset = paths.is_page_asset(connection.scope["path"])
    reason = check_fetch_destination(connection.headers.get("sec-fetch-dest"), is_page_asset=is_page_asset)
    return Denied(403, code="forbidden", message=reason) if reason is not None else None


def _authorize(connection: HTTPConnection, caller: Caller, *, has_invalid_credentials: bool) -> Caller | Denied:
    """Authorize a request to a server that requires tokens."""
    if not _is_write(connection) and paths.is_public(connection.scope["path"]):
        return caller
    if caller.principal is None:
        return unauthorized(has_invalid_credentials=has_invalid_credentials)
    if not caller.is_operator and _requires_operator(connection):
        return Denied(403, code="forbidden", message=_OPERATOR_REQUIRED, principal=caller.principal)
    return caller


def _requires_operator(connection: HTTPConnection) -> bool:
    """Return whether the request requires the operator role. All requests do, except those known to be read-only."""
    path = connection.scope["path"]
    if connection.scope["type"] == "websocket":
        return bool(path != paths.STREAM)
    return _is_write(connection) and path != paths.SESSION


def _is_write(connection: HTTPConnection) -> bool:
    return connection.scope["type"] == "websocket" or connection.scope["method"] not in _SAFE_METHODS


def unauthorized(*, has_invalid_credentials: bool) -> Denied:
    """Return the response that denies a request without valid credentials."""
    if has_invalid_credentials:
        message = "This token or session is unknown, revoked or expired."
        challenge = 'Bearer realm="sandbox", error="invalid_token"'
    else:
        message, challenge = "This server requires a token.", 'Bearer realm="sandbox"'
    return Denied(401, code="unauthorized", message=f"{message} {_TOKEN_HINT}", headers={"www-authenticate": challenge})


def _rate_limited(wait_seconds: int, principal: Principal | None) -> Denied:
    message, headers = f"Too many requests; try again in {wait_seconds} s.", {"retry-after": str(wait_seconds)}
    return Denied(429, code="rate_limit_exceeded", message=message, headers=headers, principal=principal)


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
            with self._admission.client_limits.track_request(result.principal):
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
    """Remove the token from the offered subprotocols and accept with WEBSOCKET_SUBPROTOCOL if the client offered it."""
    protocols = strip_token_protocol(scope["subprotocols"])

    async def send_agreed(message: Message) -> None:
        if message["type"] == "websocket.accept" and WEBSOCKET_SUBPROTOCOL in protocols:
            message = {**message, "subprotocol": message.get("subprotocol") or WEBSOCKET_SUBPROTOCOL}
        await send(message)

    return {**scope, "subprotocols": protocols}, send_agreed
