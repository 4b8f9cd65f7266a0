"""The credentials of a request: a token, or the cookie of a browser session. Sessions are kept in memory."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import HTTPConnection

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
        if session is None:
            return None
        if session.expires_at_seconds <= self._monotonic():
            self.close(secret)
            return None
        return session.principal_id

    def close(self, secret: str) -> None:
        """Close a session; do nothing if it is unknown."""
        self._sessions.pop(_digest(secret), None)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


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
