"""A protocol that opens neither as TLS nor as HTTP passes, unless one of the two shows in its beginning after all.

Lenient servers skip or tolerate bytes that a strict reader takes for another protocol: NUL, odd white space, a PROXY
header, an alert. So the first bytes are searched while they pass on: a request line is refused before its line end,
a ClientHello before its last byte. HTTP and PROXY are looked for until the host has spoken: an HTTP server never
speaks first, and closes after its answer to what it does not understand. TLS may begin later (STARTTLS).
"""

import re

from sandbox.gateway.egress import EgressPolicy, Refusal
from sandbox.gateway.hello_search import HelloSearch
from sandbox.gateway.limits import UNKNOWN_OPENING_BYTES_MAX
from sandbox.gateway.request_search import RequestSearch

_LINE_ENDS = (re.compile(rb"\n"), re.compile(rb"[\r\n]"))
"""To some servers a carriage return alone ends a line, to others it is white space."""

_PROXY_BINARY = b"\r\n\r\n\0\r\nQUIT\n"
_ODD_TLS = re.compile(
    rb"\x15[\x00-\x0f].\x00\x02[\x01\x02]"  # an alert
    rb"|\x14[\x00-\x0f].\x00\x01\x01"  # a change of the cipher
    rb"|[\x80-\xff].\x01(\x03[\x00-\x04]|\x00\x02)",  # a hello of SSL 2, which names nobody
    re.DOTALL,
)


class UnknownProtocol:
    """To `name`. `first`: what the client has said; `is_ended`: it says no more."""

    is_over = False

    def __init__(self, policy: EgressPolicy, name: str, port: int, first: bytes, *, is_ended: bool = False) -> None:
        self._name = name
        self._port = port
        self._first = first
        self._is_ended = is_ended
        self._hellos = HelloSearch(policy, name)
        self._requests = [RequestSearch(name, port, end) for end in _LINE_ENDS]
        self._seen = bytearray()
        self._is_no_http = False

    @property
    def is_free(self) -> bool:
        """Whether everything that is searched has come."""
        return len(self._seen) == UNKNOWN_OPENING_BYTES_MAX

    def host_spoke(self) -> None:
        """From now on it is no HTTP, unless the client has said what may be a request."""
        self._is_no_http |= not any(one.is_like_request for one in self._requests)

    def begin(self) -> bytes | Refusal:
        """What came before."""
        onward = self.client_sent(self._first)
        rest = self.client_sent(b"") if self._is_ended else b""
        return rest if isinstance(rest, Refusal) else onward

    def client_sent(self, data: bytes) -> bytes | Refusal:
        """All of it, as long as nothing in it is HTTP, or TLS for another host."""
        if len(self._seen) == UNKNOWN_OPENING_BYTES_MAX:
            return data
        self._seen += data[: UNKNOWN_OPENING_BYTES_MAX - len(self._seen)]
        reason = None if self._is_no_http else self._http_objection(is_ended=not data)
        reason = reason or self._hellos.objection(self._seen)
        return data if reason is None else Refusal(self._name, self._port, reason)

    def _http_objection(self, *, is_ended: bool) -> str | None:
        if _PROXY_BINARY in self._seen:
            return "a PROXY protocol header stands before it."
        if _ODD_TLS.match(self._seen):
            return "its TLS does not begin with a ClientHello that names its server (SNI)."
        is_last = is_ended or len(self._seen) == UNKNOWN_OPENING_BYTES_MAX
        objections = (one.objection(self._seen, is_last=is_last) for one in self._requests)
        return next((objection for objection in objections if objection is not None), None)
