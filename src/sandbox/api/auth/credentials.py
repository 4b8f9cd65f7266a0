"""Extracts the credentials of a request from its headers: a token, or the cookie of a session."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import HTTPConnection

from sandbox.api.auth.sessions import SESSION_COOKIE

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
