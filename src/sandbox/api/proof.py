"""How a client shows who it is: a token in a header, a token where a browser's WebSocket can put it, a cookie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import HTTPConnection

from sandbox.api.sessions import COOKIE

BEARER_PROTOCOL = "sandbox.bearer."
"""In front of a token that is offered as a subprotocol of a WebSocket, where pages can set no header."""

STREAM_PROTOCOL = "sandbox.v1"
"""The subprotocol that is agreed on; browsers want one of those they offered, and it must not be the token."""

_PROOF_CHARACTERS_MAX = 512


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown. `text` is hostile."""

    kind: Literal["token", "session"]
    text: str


def shown_proof(connection: HTTPConnection) -> Proof | None:
    """The proof in a request; a token goes before a cookie. What is too long to be one counts as a wrong one."""
    token = _bearer(connection.headers.get("authorization", "")) or _offered(connection.scope.get("subprotocols", ()))
    if token is not None:
        return Proof("token", token[:_PROOF_CHARACTERS_MAX])
    session = connection.cookies.get(COOKIE)
    return Proof("session", session[:_PROOF_CHARACTERS_MAX]) if session else None


def without_token(protocols: Iterable[str]) -> list[str]:
    """The subprotocols that are left for the application."""
    return [protocol for protocol in protocols if not protocol.startswith(BEARER_PROTOCOL)]


def _bearer(header: str) -> str | None:
    scheme, _, token = header.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _offered(protocols: Iterable[str]) -> str | None:
    return next((name.removeprefix(BEARER_PROTOCOL) for name in protocols if name.startswith(BEARER_PROTOCOL)), None)
