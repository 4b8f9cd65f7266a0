"""Sessions of browsers: a cookie stands for a token that was shown once. In memory; a restart ends them."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

COOKIE = "sandbox_session"
SESSION_SECONDS = 12 * 3600
"""How long a session lasts; then its token has to be shown again."""

SESSIONS_MAX = 1000
"""Open sessions; one more ends the oldest."""

SESSIONS_OF_TOKEN_MAX = 20
"""Open sessions of one token; one more ends its oldest, so that nobody signs others out."""

_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Session:
    principal_id: str
    ends_at_seconds: float


class Sessions:
    """Which cookie stands for whom. Only digests of cookies are kept."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._open: OrderedDict[str, _Session] = OrderedDict()

    def open(self, principal_id: str) -> str:
        """Begin a session; gives the cookie's value."""
        own = [digest for digest, session in self._open.items() if session.principal_id == principal_id]
        if len(own) >= SESSIONS_OF_TOKEN_MAX:
            del self._open[own[0]]
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        self._open[_digest(secret)] = _Session(principal_id, self._monotonic() + SESSION_SECONDS)
        if len(self._open) > SESSIONS_MAX:
            self._open.popitem(last=False)
        return secret

    def find(self, secret: str) -> str | None:
        """The principal's id; None when the session is unknown or over."""
        session = self._open.get(_digest(secret))
        if session is None:
            return None
        if session.ends_at_seconds <= self._monotonic():
            self.close(secret)
            return None
        return session.principal_id

    def close(self, secret: str) -> None:
        """End a session; an unknown one is fine."""
        self._open.pop(_digest(secret), None)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
