"""A protocol that opens neither as TLS nor as HTTP passes, unless one of the two shows in its beginning after all.

Lenient servers skip or tolerate bytes that a strict reader takes for another protocol: NUL, odd white space, a PROXY
header, an alert. So the first bytes are searched while they pass on: a request line is refused before its line end,
a ClientHello before its last byte. HTTP and PROXY are looked for until the host has spoken: an HTTP server never
speaks first, and closes after its answer to what it does not understand. TLS may begin later (STARTTLS).
"""

import re

from sandbox.gateway.egress import EgressPolicy, Refusal, normal
from sandbox.gateway.hello_search import HelloSearch
from sandbox.gateway.http_target import parse_authority
from sandbox.gateway.limits import UNKNOWN_OPENING_BYTES_MAX

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_SPACE = rb"[^\x21-\x7e\r\n]"  # whatever does not show: some server takes it for white space
_ABSOLUTE = rb"[A-Za-z][A-Za-z0-9+.-]*://"
_LINE_END = re.compile(rb"[\r\n]")
_BEFORE = re.compile(rb"[^\x21-\x7e]*")
_PROXY_LINE = re.compile(rb"PROXY%s" % _SPACE, re.IGNORECASE)
_PROXY_BINARY = b"\r\n\r\n\0\r\nQUIT\n"
_VERSIONED_LINE = re.compile(rb"%s+%s.*%s(HTTP|RTSP|ICE)/" % (_TOKEN, _SPACE, _SPACE), re.IGNORECASE | re.DOTALL)
_SIMPLE_LINE = re.compile(rb"[A-Z]{3,}%s+/|[A-Za-z]{3,}%s+%s" % (_SPACE, _SPACE, _ABSOLUTE))
_WORDS = re.compile(rb"%s+%s+[\x21-\x7e]" % (_TOKEN, _SPACE))
_TARGET = re.compile(rb"[A-Za-z]%s+(/|\*|%s)" % (_SPACE, _ABSOLUTE))
_VERSION = re.compile(rb"%sHTTP/[0-9][0-9.]*(%s|\Z)" % (_SPACE, _SPACE), re.IGNORECASE)
_HOST_LINE = re.compile(rb"%s*host%s*:(.*)" % (_SPACE, _SPACE), re.IGNORECASE | re.DOTALL)
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
        self._seen = bytearray()
        self._line_begin = 0
        self._searched = 0
        self._has_first_line = False
        self._is_like_request = False
        self._host_has_spoken = False

    def host_spoke(self) -> None:
        """From now on it is no HTTP."""
        self._host_has_spoken = True

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
        reason = None if self._host_has_spoken else self._http_objection(is_last=not data)
        reason = reason or self._hellos.objection(self._seen)
        return data if reason is None else Refusal(self._name, self._port, reason)

    def _http_objection(self, *, is_last: bool) -> str | None:
        seen = self._seen
        if _PROXY_BINARY in seen:
            return "a PROXY protocol header stands before it."
        if _ODD_TLS.match(seen):
            return "its TLS does not begin with a ClientHello that names its server (SNI)."
        is_last |= len(seen) == UNKNOWN_OPENING_BYTES_MAX
        while (end := _LINE_END.search(seen, self._searched)) is not None:
            objection = self._line_objection(bytes(seen[self._line_begin : end.start()]))
            self._line_begin = self._searched = end.end()
            if objection is not None:
                return objection
        self._searched = len(seen)
        return self._line_objection(bytes(seen[self._line_begin :])) if is_last else None

    def _line_objection(self, line: bytes) -> str | None:
        if self._has_first_line:
            return self._later_objection(line)
        line = _BEFORE.sub(b"", line, count=1)
        if not line:
            return None
        self._has_first_line = True
        self._is_like_request = _WORDS.match(line) is not None
        if _PROXY_LINE.match(line):
            return "a PROXY protocol header stands before it."
        if _VERSIONED_LINE.match(line) or _SIMPLE_LINE.match(line):
            return "its first line is HTTP that servers read differently."
        return self._later_objection(line)

    def _later_objection(self, line: bytes) -> str | None:
        version = max((found.start() for found in _VERSION.finditer(line)), default=0)
        if _TARGET.search(line, 0, version):
            return "an HTTP request stands behind other bytes."
        host = _HOST_LINE.match(line) if self._is_like_request else None
        if host is None:
            return None
        asked = parse_authority(host[1].strip(), default_port=self._port)
        is_right = asked is not None and (normal(asked.host), asked.port) == (normal(self._name), self._port)
        return None if is_right else f"the connection is to {self._name}, but its Host header asks for another."
