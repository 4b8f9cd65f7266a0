"""Authenticates and authorizes requests, and rejects requests that pages of other sites have forged.

A server without tokens listens on a loopback address, and any client that reaches the port is the operator. Therefore,
requests from pages of other sites are detected by `Host`, `Origin` and `Sec-Fetch-Site`. On a server with tokens, such
a page cannot forge a request that contains a token. But the page can trigger a request with a session cookie, so
`Origin` and `Sec-Fetch-Site` are still checked.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import HTTPConnection

from sandbox.api import paths
from sandbox.api.auth.cross_site_requests import (
    LOOPBACK_NAMES,
    check_fetch_destination,
    check_fetch_site,
    check_host,
    check_origin,
)
from sandbox.api.auth.sessions import SESSION_COOKIE, SessionStore
from sandbox.api.errors import TooManyStreamsError
from sandbox.api.rate_limit import RateLimiter, client_key
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import Principal, Role, TokenStore
from sandbox.primitives.fair_client_shares import FairShare, FairShares

BEARER_PROTOCOL = "sandbox.bearer."
"""Prefix of a token that is sent as a WebSocket subprotocol, because pages cannot set headers on a WebSocket."""

STREAM_PROTOCOL = "sandbox.v1"
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
    return [protocol for protocol in protocols if not protocol.startswith(BEARER_PROTOCOL)]


def _bearer_token(header: str) -> str | None:
    scheme, _, token = header.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _subprotocol_token(protocols: Iterable[str]) -> str | None:
    return next((name.removeprefix(BEARER_PROTOCOL) for name in protocols if name.startswith(BEARER_PROTOCOL)), None)


LOCAL_OPERATOR = Principal("", "local", Role.OPERATOR)
"""The principal of every client of a server without tokens."""

CONCURRENT_REQUESTS_MAX = 1000
"""Maximum number of concurrent requests per token, including streams; further requests get 429."""

ALL_TASKS_STREAMS_MAX = 100
"""Maximum number of concurrent all-task streams per token; further streams get 429. Each stream encodes every event."""

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


class Authenticator:
    """Authenticates all requests to one server, on both of its ports."""

    def __init__(
        self, token_store: TokenStore, settings: ApiSettings, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.sessions = SessionStore(monotonic)
        self._token_store = token_store
        self._settings = settings
        self._host_names = LOOPBACK_NAMES | {name.lower() for name in settings.host_names}
        self._rate_limiter = RateLimiter(settings.requests_per_minute, monotonic)
        self._requests_in_progress: Counter[str] = Counter()
        self._all_tasks_streams: Counter[str] = Counter()
        self._shares = FairShares()

    def clone_hosts(self) -> frozenset[str] | None:
        """Return the hosts from which repositories may be cloned; None means any."""
        return self._settings.clone_hosts if self._requires_token() else None

    def authenticate(self, connection: HTTPConnection) -> Caller | Denied:
        """Authenticate and authorize a request."""
        credentials = extract_credentials(connection)
        principal = self._find_principal(credentials)
        requires_token = self._requires_token()
        # Deny before counting: cross-site requests must not use up the operator's rate limit.
        if denied := self._deny_cross_site(connection, credentials, requires_token=requires_token):
            return denied
        client = f"token {principal.id}" if principal else client_key(connection.client and connection.client.host)
        if wait_seconds := self._rate_limiter.acquire(client):
            return _rate_limited(wait_seconds, principal)
        if principal and self._requests_in_progress[principal.id] >= CONCURRENT_REQUESTS_MAX:
            return _rate_limited(1, principal)
        if not requires_token:
            return Caller(LOCAL_OPERATOR)
        return _authorize(
            connection,
            Caller(principal, credentials if principal else None),
            has_invalid_credentials=credentials is not None,
        )

    @contextmanager
    def count_request(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is being processed. Does nothing on a server without tokens."""
        name = caller.principal.id if caller.principal else LOCAL_OPERATOR.id
        self._requests_in_progress[name] += bool(name)
        try:
            yield
        finally:
            self._requests_in_progress[name] -= bool(name)
            if not self._requests_in_progress[name]:
                del self._requests_in_progress[name]

    def fair_share_of(self, principal: Principal | None) -> FairShare:
        """Return the caller's share of the event loop. All anonymous callers share one."""
        return self._shares.of(principal.id if principal else "-")

    @contextmanager
    def count_all_tasks_stream(self, caller: Caller) -> Iterator[None]:
        """Count an all-task stream while it is open. Raises TooManyStreamsError."""
        name = caller.principal.id if caller.principal else "-"
        if self._all_tasks_streams[name] >= ALL_TASKS_STREAMS_MAX:
            raise TooManyStreamsError(ALL_TASKS_STREAMS_MAX)
        self._all_tasks_streams[name] += 1
        try:
            yield
        finally:
            self._all_tasks_streams[name] -= 1
            if not self._all_tasks_streams[name]:
                del self._all_tasks_streams[name]

    def is_still_valid(self, caller: Caller) -> bool:
        """Return whether the caller's credentials are still valid and still have the same role."""
        if caller.principal is None:
            return True
        if caller.credentials is None:
            return not self._requires_token()
        is_open = caller.credentials.kind == "token" or self.sessions.find(caller.credentials.value) is not None
        current = self._token_store.find_principal(caller.principal.id)
        return is_open and current is not None and current.role is caller.principal.role

    def _requires_token(self) -> bool:
        return self._settings.requires_token or self._token_store.has_tokens

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
        check = check_origin if requires_token else check_host
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
