"""Admits or denies requests: by credentials, role and rate limit, and by whether a page of another site forged them.

A server without tokens listens on a loopback address, and any client that reaches the port is the operator. Therefore,
requests from pages of other sites are detected by `Host`, `Origin` and `Sec-Fetch-Site`. On a server with tokens, such
a page cannot forge a request that contains a token. But the page can trigger a request with a session cookie, so
`Origin` and `Sec-Fetch-Site` are still checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from sandbox.api import paths
from sandbox.api.auth.credentials import Credentials, extract_credentials
from sandbox.api.auth.cross_site_requests import (
    LOOPBACK_NAMES,
    check_fetch_destination,
    check_fetch_site,
    check_host_and_origin,
    check_origin,
)
from sandbox.api.auth.sessions import SessionStore
from sandbox.api.client_limits import ClientLimits
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import Principal, Role, TokenStore

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
    """Decides about all requests to one server, on both of its ports."""

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
        if wait_seconds := self.client_limits.throttle_seconds(principal, address):
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
