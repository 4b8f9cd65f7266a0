"""Who is let in, and what they may ask for.

Without tokens on a loopback address whoever reaches the port is the operator, so pages of other sites must be told
from programs by `Host`, `Origin` and `Sec-Fetch-Site`. With tokens a request that brings one cannot have been forged by
a page; a cookie can, so the last two still count there.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import HTTPConnection

from sandbox.api import paths
from sandbox.api.auth.rate_limit import RateLimit, name_client
from sandbox.api.auth.sessions import COOKIE, Sessions
from sandbox.api.errors import TooManyStreamsError
from sandbox.api.settings import ApiSettings
from sandbox.api.streaming.fair_share import Share, Shares
from sandbox.interfaces.auth import Access, Principal, Role

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


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_SCHEME_PORTS = {"http": 80, "https": 443}
_FETCHED = frozenset({"document", "empty"})
"""A navigation, which downloads what is no page, and what a script asks for: `fetch`, `EventSource`."""
_LOADED = _FETCHED | {"script", "style", "image"}


def refusal(host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]) -> str | None:
    """Why a request with these headers is refused, None when it is not.

    names: the host names that are this server's; ports: the ports that it listens on.
    """
    if host is None or _name_and_port(f"http://{host}", names) is None:
        return "The Host header names another server; use the address that this one listens on, or a configured name."
    return origin_refusal(host, origin, names=names, ports=ports)


def origin_refusal(
    host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]
) -> str | None:
    """Why a request from this page is refused, None when it is not; programs send no `Origin`."""
    if origin is None or origin.lower() in {f"http://{host}".lower(), f"https://{host}".lower()}:
        return None
    place = _name_and_port(origin, names)
    if place is None or place[1] not in ports:
        return "The Origin header names a page that is not of this server."
    return None


def embedding_refusal(method: str | None, headers: Mapping[str, str]) -> str | None:
    """Why a request without `Origin` for a page of another site is refused, None when it is not; links are followed."""
    if "origin" in headers or headers.get("sec-fetch-site") not in {"cross-site", "same-site"}:
        return None
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    if method == "GET" and is_link:
        return None
    return "The Sec-Fetch-Site header names a page that is not of this server."


def destination_refusal(destination: str | None, *, is_part_of_page: bool) -> str | None:
    """Why a browser may not have this for its `Sec-Fetch-Dest`, None when it may; programs send none.

    Only the files of the server's own pages may run or style anything. Other answers may have text of an agent in them.
    """
    if destination is None or destination in (_LOADED if is_part_of_page else _FETCHED):
        return None
    return "The Sec-Fetch-Dest header says that a page would run, show or embed this; it can be fetched or downloaded."


def _name_and_port(origin: str, names: Collection[str]) -> tuple[str, int] | None:
    """The host and port of an origin, None when it is malformed or not among `names`."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return None
    name = match["name"].strip("[]")
    return (name, int(match["port"] or _SCHEME_PORTS[match["scheme"]])) if name in names else None


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
