"""Forwards protocols other than TLS and HTTP, unless TLS or HTTP follows in their data.

Lenient servers skip or accept bytes that a strict parser treats as another protocol: NUL, unusual white space, a PROXY
header, an alert. Therefore the first bytes are searched while they are forwarded: a request line is denied before its
line end, a ClientHello before its last byte. HTTP and PROXY are searched for until the host has sent data: an HTTP
server never sends data first, and closes the connection after its response to bytes that it cannot parse. TLS may start
later (STARTTLS).
"""

import re

from sandbox.gateway.egress.client_hello import ClientHelloSearch
from sandbox.gateway.egress.inspection import Denial
from sandbox.gateway.egress.policy import EgressPolicy, normalize_host
from sandbox.gateway.http_forwarding import parse_authority
from sandbox.gateway.limits import UNKNOWN_PROTOCOL_BYTES_MAX

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""Matches a character of a request's method (RFC 9110 §5.6.2)."""

_NON_PRINTABLE = rb"[^\x21-\x7e]"  # any byte that is not printable: some servers treat it as white space
_ABSOLUTE = rb"(?!(?<=\0{3})opc\.tcp:)[A-Za-z][A-Za-z0-9+.-]*://"  # except in an OPC UA hello
_LEADING_INVISIBLE = re.compile(rb"[^\x21-\x7e]*")
_PROXY_LINE = re.compile(rb"PROXY(%s|\Z)" % _NON_PRINTABLE, re.IGNORECASE)
_VERSIONED_LINE = re.compile(
    rb"%s+%s.*%s(HTTP|RTSP|ICE)/|[\x21-\x7e]+%s.*%sHTTP/[0-9][0-9.]*%s*\Z" % (TOKEN, *[_NON_PRINTABLE] * 5),
    re.IGNORECASE | re.DOTALL,
)
_SIMPLE_LINE = re.compile(rb"[A-Z]{3,}%s+/" % _NON_PRINTABLE)
_ABSOLUTE_LINE = re.compile(rb"[\x21-\x39\x3b-\x7e]{3,}%s+%s" % (_NON_PRINTABLE, _ABSOLUTE))
_ABSOLUTE_AFTER_ANY_METHOD = re.compile(rb"[^ ]* +%s[\x21-\x7e]*%s+[\x21-\x7e]" % (_ABSOLUTE, _NON_PRINTABLE))
"""Matches a request line with an absolute URL. Some servers accept any method, even an empty one, and any version."""

_ABSOLUTE_FIRST_LINE = re.compile(rb"[^ \t]*[ \t]+%s" % _ABSOLUTE)
_CONNECT_LINE = re.compile(rb"CONNECT%s+[!-z]" % _NON_PRINTABLE)
"""Matches a CONNECT request with or without a version, because some servers do not require one.

CONNECT followed by JSON, the first line of NATS, is excluded.
"""

_EMPTY_LINE_ENDS = (b"\n\r\n", b"\n\n", b"\r\r")
_TWO_WORDS = re.compile(rb"[\x21-\x7e]+%s[ \t\r]*[^ \t\r]" % _NON_PRINTABLE)
_TARGET = re.compile(rb"[A-Za-z]%s+(/|\*|%s)" % (_NON_PRINTABLE, _ABSOLUTE))
_VERSION = re.compile(rb"%sHTTP/[0-9][0-9.]*(%s|\Z)" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE)
_VERSION_START = re.compile(rb"%sHTTP/[0-9]" % _NON_PRINTABLE, re.IGNORECASE)
_CONNECTION_LINE = re.compile(rb"%s*(proxy-)?connection%s*:" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE)
_HOST_LINE = re.compile(rb"%s*host%s*:(.*)" % (_NON_PRINTABLE, _NON_PRINTABLE), re.IGNORECASE | re.DOTALL)


class HttpRequestSearch:
    """Searches for an HTTP request in the data of a client connected to `name` on `port`. line_end: matches a line end.

    is_possible_request: the first line has two words, or a later one has an HTTP version. Some servers treat a line of
    two words as a request without a version (HTTP/0.9), respond to it, and read another request.
    """

    def __init__(self, name: str, port: int, line_end: re.Pattern[bytes]) -> None:
        self._name = name
        self._port = port
        self._line_end = line_end
        self._line_start = 0
        self._searched = 0
        self._has_first_line = False
        self._has_empty_line = False
        self.is_possible_request = False

    def deny_reason(self, received: bytearray, *, is_last: bool) -> str | None:
        """Return why a line in the bytes received so far is denied, or None.

        is_last: no more bytes will be searched.
        """
        while (end := self._line_end.search(received, self._searched)) is not None:
            reason = self._line_deny_reason(bytes(received[self._line_start : end.start()]))
            self._has_empty_line |= received[max(0, end.end() - 3) : end.end()].endswith(_EMPTY_LINE_ENDS)
            self._line_start = self._searched = end.end()
            if reason is not None:
                return reason
        self._searched = len(received)
        return self._line_deny_reason(bytes(received[self._line_start :])) if is_last else None

    def _line_deny_reason(self, line: bytes) -> str | None:
        may_start_request = not self._has_first_line or (self._has_empty_line and self.is_possible_request)
        if may_start_request and _ABSOLUTE_AFTER_ANY_METHOD.match(line):
            return "the connection contains HTTP that servers may interpret differently."
        if not self._has_first_line:
            is_absolute = _ABSOLUTE_FIRST_LINE.match(line) is not None
            line = _LEADING_INVISIBLE.sub(b"", line, count=1)
            if not line:
                return None
            self._has_first_line = True
            self.is_possible_request = _TWO_WORDS.match(line) is not None
            if _PROXY_LINE.match(line):
                return "the connection starts with a PROXY protocol header."
            patterns = (_VERSIONED_LINE, _SIMPLE_LINE, _ABSOLUTE_LINE, _CONNECT_LINE)
            if is_absolute or any(pattern.match(line) for pattern in patterns):
                return "the connection's first line is HTTP that servers may interpret differently."
        elif self.is_possible_request:
            reason = self._header_deny_reason(line)
            if reason is not None:
                return reason
        else:
            self.is_possible_request = _VERSION_START.search(line) is not None
        version = max((match.start() for match in _VERSION.finditer(line)), default=0)
        has_request = _TARGET.search(line, 0, version) is not None
        return "the connection contains an HTTP request after other bytes." if has_request else None

    def _header_deny_reason(self, line: bytes) -> str | None:
        if _ABSOLUTE_LINE.match(line) or _CONNECTION_LINE.match(line):
            return "the connection contains HTTP that servers may interpret differently."
        host = _HOST_LINE.match(line)
        if host is None:
            return None
        requested = parse_authority(host[1].strip(), default_port=self._port)
        is_allowed = requested is not None and (normalize_host(requested.host), requested.port) == (
            normalize_host(self._name),
            self._port,
        )
        return None if is_allowed else f"the connection is to {self._name}, but its Host header names a different host."


_LINE_ENDS = (re.compile(rb"\n"), re.compile(rb"[\r\n]"))
"""Patterns of a line end. Some servers end a line at a bare carriage return; others treat it as white space."""

_PROXY_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_NONSTANDARD_TLS = re.compile(
    rb"\x15[\x00-\x0f].\x00\x02[\x01\x02]"  # an alert
    rb"|\x14[\x00-\x0f].\x00\x01\x01"  # a ChangeCipherSpec
    rb"|\x16[^\x03].[\x00-\x40].\x01[\x00-\x02]..\x03"  # a ClientHello in a record of another version
    rb"|[\x80-\xff].\x01(\x03[\x00-\x04]|\x00\x02)",  # an SSL 2 hello, which has no server name
    re.DOTALL,
)


class UnknownProtocolFilter:
    """Searches a connection to `name` for TLS and HTTP.

    initial_data: bytes already received.
    is_eof: no more bytes will follow.
    """

    drops_rest = False

    def __init__(
        self, policy: EgressPolicy, name: str, port: int, initial_data: bytes, *, is_eof: bool = False
    ) -> None:
        self._name = name
        self._port = port
        self._initial_data = initial_data
        self._is_eof = is_eof
        self._hello_search = ClientHelloSearch(policy, name)
        self._request_searches = [HttpRequestSearch(name, port, end) for end in _LINE_ENDS]
        self._received = bytearray()
        self._is_not_http = False

    @property
    def is_passthrough(self) -> bool:
        """Whether all bytes to search have been received."""
        return len(self._received) == UNKNOWN_PROTOCOL_BYTES_MAX

    @property
    def may_end_in_denied_line(self) -> bool:
        """Whether more bytes will be searched. The bytes received so far are forwarded."""
        return not self.is_passthrough

    def host_data_received(self) -> None:
        """Stop searching for HTTP, unless the client has sent a possible request."""
        self._is_not_http |= not any(one.is_possible_request for one in self._request_searches)

    def start(self) -> bytes | Denial:
        """Return the bytes received so far, or a denial."""
        output = self.client_data_received(self._initial_data)
        rest = self.client_data_received(b"") if self._is_eof else b""
        return rest if isinstance(rest, Denial) else output

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return all data unless it contains HTTP, or TLS for another host."""
        if len(self._received) == UNKNOWN_PROTOCOL_BYTES_MAX:
            return data
        self._received += data[: UNKNOWN_PROTOCOL_BYTES_MAX - len(self._received)]
        reason = None if self._is_not_http else self._http_deny_reason(is_eof=not data)
        reason = reason or self._hello_search.deny_reason(self._received)
        return data if reason is None else Denial(self._name, self._port, reason)

    def _http_deny_reason(self, *, is_eof: bool) -> str | None:
        if _PROXY_V2_SIGNATURE in self._received:
            return "the connection starts with a PROXY protocol header."
        if _NONSTANDARD_TLS.match(self._received):
            return "the TLS connection does not start with a ClientHello that names the server (SNI)."
        is_last = is_eof or len(self._received) == UNKNOWN_PROTOCOL_BYTES_MAX
        deny_reasons = (one.deny_reason(self._received, is_last=is_last) for one in self._request_searches)
        return next((reason for reason in deny_reasons if reason is not None), None)
