"""Browser sessions: a browser exchanges a token for a cookie. Sessions are kept in memory; a restart ends them."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

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
