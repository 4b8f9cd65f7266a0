"""Who is let in, and what they may ask for.

Without tokens on a loopback address whoever reaches the port is the operator, so pages of other sites must be told
from programs by `Host`, `Origin` and `Sec-Fetch-Site`. With tokens a request that brings one cannot have been forged by
a page; a cookie can, so the last two still count there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from sandbox.api import paths
from sandbox.api.errors import TooManyStreamsError
from sandbox.api.origin import LOOPBACK_NAMES, destination_refusal, embedding_refusal, origin_refusal, refusal
from sandbox.api.proof import Proof, shown_proof
from sandbox.api.rate_limit import RateLimit, name_client
from sandbox.api.sessions import Sessions
from sandbox.api.settings import ApiSettings
from sandbox.api.share import Share, Shares
from sandbox.contracts.access import Access, Principal, Role

LOCAL_OPERATOR = Principal("", "local", Role.OPERATOR)
"""Whoever reaches the port of a server without tokens."""

REQUESTS_AT_ONCE_MAX = 1000
"""Requests of one token that are being answered, streams among them; a further one gets 429."""

STREAMS_OF_ALL_MAX = 100
"""Streams of all tasks that one token has at once; a further one gets 429. Each costs for everything that happens."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_VIEWERS_LOOK_ON = "This token may only look on; this needs one with the role operator."
_ADVICE = (
    "Send a token as 'Authorization: Bearer …' (on the command line: --token or SANDBOX_TOKEN); "
    "whoever runs the server makes one with: sandbox token create"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that keeps a client out. principal: who they are, where they showed it."""

    status: int
    code: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)
    principal: Principal | None = None


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who was let in. principal: None for one who needs no name; proof: what they showed for it."""

    principal: Principal | None
    proof: Proof | None = None

    @property
    def is_operator(self) -> bool:
        """Whether they may do and see everything."""
        return self.principal is not None and self.principal.role is Role.OPERATOR


class Guard:
    """Keeps the doors of one server; all its doors share it."""

    def __init__(self, access: Access, settings: ApiSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.sessions = Sessions(monotonic)
        self._access = access
        self._settings = settings
        self._names = LOOPBACK_NAMES | {name.lower() for name in settings.host_names}
        self._rates = RateLimit(settings.requests_per_minute, monotonic)
        self._under_way: Counter[str] = Counter()
        self._following_all: Counter[str] = Counter()
        self._shares = Shares()

    def clone_hosts(self) -> frozenset[str] | None:
        """Where repositories may come from; None for anywhere."""
        return self._settings.clone_hosts if self._asks_for_tokens() else None

    def admit(self, connection: HTTPConnection) -> Visitor | Refusal:
        """Let a request in or not."""
        proof = shown_proof(connection)
        principal = self._identify(proof)
        asks_for_tokens = self._asks_for_tokens()
        # Before it is counted: what pages of other sites send must not use up what the operator may ask.
        if refused := self._foreign(connection, proof, asks_for_tokens=asks_for_tokens):
            return refused
        client = f"token {principal.id}" if principal else name_client(connection.client and connection.client.host)
        if wait_seconds := self._rates.take(client):
            return _too_many(wait_seconds, principal)
        if principal and self._under_way[principal.id] >= REQUESTS_AT_ONCE_MAX:
            return _too_many(1, principal)
        if not asks_for_tokens:
            return Visitor(LOCAL_OPERATOR)
        return _judge(connection, Visitor(principal, proof if principal else None), is_wrong=proof is not None)

    @contextmanager
    def answering(self, visitor: Visitor) -> Iterator[None]:
        """Count a request while it is being answered. A server without tokens counts none."""
        name = visitor.principal.id if visitor.principal else ""
        self._under_way[name] += bool(name)
        try:
            yield
        finally:
            self._under_way[name] -= bool(name)
            if not self._under_way[name]:
                del self._under_way[name]

    def share_of(self, visitor: Visitor) -> Share:
        """The visitor's part of the event loop. Those who need no name have one together."""
        return self._shares.of(visitor.principal.id if visitor.principal else "-")

    @contextmanager
    def following_all(self, visitor: Visitor) -> Iterator[None]:
        """Count a stream of all tasks. Raises TooManyStreamsError."""
        name = visitor.principal.id if visitor.principal else "-"
        if self._following_all[name] >= STREAMS_OF_ALL_MAX:
            raise TooManyStreamsError(STREAMS_OF_ALL_MAX)
        self._following_all[name] += 1
        try:
            yield
        finally:
            self._following_all[name] -= 1
            if not self._following_all[name]:
                del self._following_all[name]

    def still_knows(self, visitor: Visitor) -> bool:
        """Whether somebody who was let in would be let in again."""
        if visitor.principal is None:
            return True
        if visitor.proof is None:
            return not self._asks_for_tokens()
        is_open = visitor.proof.kind == "token" or self.sessions.find(visitor.proof.text) is not None
        return is_open and self._access.find(visitor.principal.id) is not None

    def _asks_for_tokens(self) -> bool:
        return self._settings.needs_token or self._access.has_tokens

    def _identify(self, proof: Proof | None) -> Principal | None:
        if proof is None:
            return None
        if proof.kind == "token":
            return self._access.authenticate(proof.text)
        principal_id = self.sessions.find(proof.text)
        return self._access.find(principal_id) if principal_id is not None else None

    def _foreign(self, connection: HTTPConnection, proof: Proof | None, *, asks_for_tokens: bool) -> Refusal | None:
        """Refuses what a page of another site may have forged: it has no token, but it may have a cookie."""
        if connection.scope["type"] == "http" and (misused := _misused(connection)):
            return misused
        has_cookie = proof is not None and proof.kind == "session"
        if asks_for_tokens and not has_cookie:
            return None
        check = origin_refusal if asks_for_tokens else refusal
        host, origin = (connection.headers.get(name) for name in ("host", "origin"))
        reason = check(host, origin, names=self._names, ports=self._settings.ports) or embedding_refusal(
            connection.scope.get("method"), connection.headers
        )
        return Refusal(403, code="forbidden", message=reason) if reason is not None else None


def _misused(connection: HTTPConnection) -> Refusal | None:
    """Refuses requests by which a page, also one of this server, would run or embed the answer."""
    is_part_of_page = paths.is_part_of_page(connection.scope["path"])
    reason = destination_refusal(connection.headers.get("sec-fetch-dest"), is_part_of_page=is_part_of_page)
    return Refusal(403, code="forbidden", message=reason) if reason is not None else None


def _judge(connection: HTTPConnection, visitor: Visitor, *, is_wrong: bool) -> Visitor | Refusal:
    """For a server with tokens."""
    if not _is_change(connection) and paths.is_open(connection.scope["path"]):
        return visitor
    if visitor.principal is None:
        return _unauthorized(is_wrong=is_wrong)
    if not visitor.is_operator and _needs_operator(connection):
        return Refusal(403, code="forbidden", message=_VIEWERS_LOOK_ON, principal=visitor.principal)
    return visitor


def _needs_operator(connection: HTTPConnection) -> bool:
    """What is not known to be harmless needs one."""
    path = connection.scope["path"]
    if connection.scope["type"] == "websocket":
        return bool(path != paths.STREAM)
    return _is_change(connection) and path != paths.SESSION


def _is_change(connection: HTTPConnection) -> bool:
    return connection.scope["type"] == "websocket" or connection.scope["method"] not in _READING


def _unauthorized(*, is_wrong: bool) -> Refusal:
    if is_wrong:
        message = "This token or session is unknown, revoked or over."
        challenge = 'Bearer realm="sandbox", error="invalid_token"'
    else:
        message, challenge = "This server answers only with a token.", 'Bearer realm="sandbox"'
    return Refusal(401, code="unauthorized", message=f"{message} {_ADVICE}", headers={"www-authenticate": challenge})


def _too_many(wait_seconds: int, principal: Principal | None) -> Refusal:
    message, headers = f"Too many requests; try again in {wait_seconds} s.", {"retry-after": str(wait_seconds)}
    return Refusal(429, code="rate_limit_exceeded", message=message, headers=headers, principal=principal)
