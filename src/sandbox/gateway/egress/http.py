"""HTTP from the sandbox: parses targets, checks and rewrites plain requests, finds requests in unknown protocols."""

import re
from typing import Any

import h11
import msgspec

from sandbox.gateway import http_messages
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy, denial_message, normalize_host
from sandbox.gateway.http_messages import Headers, connection_header_names, framing_headers

_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_ABSOLUTE_FORM = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")


class HostPort(msgspec.Struct, frozen=True):
    """A host (in its original case, without brackets) and a port."""

    host: str
    port: int


class AbsoluteTarget(msgspec.Struct, frozen=True):
    """An absolute-form target: scheme, authority, and the path and query to send to the host."""

    scheme: str
    authority: HostPort
    path: bytes


def parse_authority(authority: bytes, default_port: int) -> HostPort | None:
    """Parse a host and an optional port; return None for anything else, including an authority with user info."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or (port := int(match[2] or default_port)) > 65535:
        return None
    return HostPort(match[1].decode().strip("[]"), port)


def parse_absolute_form(target: bytes) -> AbsoluteTarget | None:
    """Parse a target in absolute form; return None for anything else."""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        return None
    scheme = match[1].decode().lower()
    authority = parse_authority(match[2], default_port=443 if scheme == "https" else 80)
    path = match[3] if match[3].startswith(b"/") else b"/" + match[3]
    return AbsoluteTarget(scheme, authority, path) if authority is not None else None


TCHAR = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""Matches one character of a token, such as a request's method (tchar, RFC 9110 §5.6.2)."""

_NON_PRINTABLE = rb"[^\x21-\x7e]"  # any byte that is not printable: some servers treat it as white space
_ABSOLUTE = rb"(?!(?<=\0{3})opc\.tcp:)[A-Za-z][A-Za-z0-9+.-]*://"  # except in an OPC UA hello
_LEADING_INVISIBLE = re.compile(rb"[^\x21-\x7e]*")
_PROXY_LINE = re.compile(rb"PROXY(%s|\Z)" % _NON_PRINTABLE, re.IGNORECASE)
_VERSIONED_LINE = re.compile(
    rb"%s+%s.*%s(HTTP|RTSP|ICE)/|[\x21-\x7e]+%s.*%sHTTP/[0-9][0-9.]*%s*\Z" % (TCHAR, *[_NON_PRINTABLE] * 5),
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


LINE_ENDS = (re.compile(rb"\n"), re.compile(rb"[\r\n]"))
"""Patterns of a line end. Some servers end a line at a bare carriage return; others treat it as white space."""


_MALFORMED = "this is not valid HTTP/1.1."
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
"""Matches the value of a Content-Length header, with at most 18 digits.

A server with 64-bit integers would read a longer number as a small one, and the rest of the body as a request.
"""


class HttpInspector:
    """Inspects a connection to `name`, or to `address` if no name was assigned to that address (`name` is None)."""

    def __init__(self, policy: EgressPolicy, name: str | None, address: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._address = address
        self._port = port
        self._client_side = http_messages.create_server_state()

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """Wait for a complete request head and check it."""
        try:
            self._client_side.receive_data(data)
            event: Any = self._client_side.next_event()
        except h11.RemoteProtocolError:
            return self._deny(self._name or self._address, self._port, _MALFORMED, status=400)
        if isinstance(event, h11.Request):
            return self._check(event)
        return None if data else Denial(self._name or self._address, self._port, _MALFORMED)

    def _check(self, request: h11.Request) -> Tunnel | Denial:
        requested = self._requested_authority(request)
        if requested is None:
            reason = "the request must have one Host header, with a valid host."
            return self._deny(self._name or self._address, self._port, reason, request.method, status=400)
        deny_reason = self._policy.deny_reason(self._name or requested.host, self._port) or self._mismatch(
            requested, request
        )
        if deny_reason is not None:
            return self._deny(requested.host, requested.port, deny_reason, request.method)
        return create_single_request_tunnel(
            self._client_side, request, request.target, HostPort(self._name or requested.host, self._port)
        )

    def _requested_authority(self, request: h11.Request) -> HostPort | None:
        hosts = [value for name, value in request.headers if name == b"host"]
        return parse_authority(hosts[0], default_port=self._port) if len(hosts) == 1 else None

    def _mismatch(self, requested: HostPort, request: h11.Request) -> str | None:
        if self._name is None:
            return f"{self._address} is not assigned to a host name."
        if (normalize_host(requested.host), requested.port) != (normalize_host(self._name), self._port):
            return f"the connection is to {self._name}, but its Host header names a different host."
        if not request.target.startswith(b"/") and request.target != b"*":
            return "the target of a direct request must start with a slash."
        return None

    def _deny(self, host: str, port: int, reason: str, method: bytes = b"", status: int = 403) -> Denial:
        response = http_messages.plain_text_error(status, denial_message(host, port, reason)).encode(
            self._client_side, method
        )
        return Denial(host, port, reason, response)


class SingleRequestFilter:
    """Forwards one request with new framing and discards all data after it."""

    is_passthrough = False
    may_end_in_denied_line = False

    def __init__(self, client_side: h11.Connection, request: h11.Request, authority: HostPort) -> None:
        self._client_side = client_side
        self._authority = authority
        self._upstream_side = http_messages.create_client_state()
        self._head = self._upstream_side.send(request) or b""
        self.drops_rest = False

    def start(self) -> bytes | Denial:
        """Return the head and the body bytes that arrived with it."""
        body = self._forward()
        return body if isinstance(body, Denial) else self._head + body

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return the bytes that belong to the request body."""
        if self.drops_rest:
            return b""
        try:
            self._client_side.receive_data(data)
        except h11.RemoteProtocolError:
            return Denial(self._authority.host, self._authority.port, _MALFORMED)
        return self._forward()

    def host_data_received(self) -> None:
        """Do nothing, because a response may arrive before the request has ended."""

    def _forward(self) -> bytes | Denial:
        output = bytearray()
        try:
            while not self.drops_rest:
                event: Any = self._client_side.next_event()
                if event in (h11.NEED_DATA, h11.PAUSED):
                    break
                if isinstance(event, h11.EndOfMessage):
                    event = h11.EndOfMessage()  # without trailers
                    self.drops_rest = True
                output += self._upstream_side.send(event) or b""
        except h11.ProtocolError:
            return Denial(self._authority.host, self._authority.port, _MALFORMED)
        return bytes(output)


def create_single_request_tunnel(
    client_side: h11.Connection, request: h11.Request, target: bytes, authority: HostPort
) -> Tunnel | Denial:
    """Return a tunnel to `authority` for a request that the policy allows, or a denial if the request is ambiguous."""
    reason = _ambiguity(request)
    if reason is not None:
        response = http_messages.plain_text_error(400, denial_message(authority.host, authority.port, reason)).encode(
            client_side, request.method
        )
        return Denial(authority.host, authority.port, reason, response)

    def unreachable_response(status: int, message: str) -> bytes:
        return http_messages.plain_text_error(status, message).encode(client_side, request.method)

    return Tunnel(
        authority.host,
        authority.port,
        SingleRequestFilter(client_side, _forwarded_single_request(request, target), authority),
        unreachable_response=unreachable_response,
    )


def _ambiguity(request: h11.Request) -> str | None:
    """Return why two parsers may interpret the request differently, or None."""
    names = {name for name, _ in request.headers}
    if {b"transfer-encoding", b"content-length"} <= names:
        return "a request must not have both Content-Length and Transfer-Encoding."
    if (
        b"content-length" in names
        and _LENGTH.fullmatch(http_messages.header(request.headers, b"content-length")) is None
    ):
        return "Content-Length must have at most 18 digits, without leading zeros."
    if b"host" in connection_header_names(request):
        return "the Connection header must not list Host."
    return None


_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_HOST_WORDS = frozenset({b"authority", b"host", b"hostname", b"uri", b"url", b"vhost"})
_HOST_QUALIFIERS = frozenset(
    {
        b"backend",
        b"base",
        b"client",
        b"destination",
        b"dst",
        b"envoy",
        b"forward",
        b"forwarded",
        b"http",
        b"orig",
        b"original",
        b"override",
        b"proxy",
        b"real",
        b"request",
        b"rewrite",
        b"server",
        b"surrogate",
        b"target",
        b"true",
        b"upstream",
        b"x",
    }
)
"""Words in the names of headers that programs use instead of Host, such as `X-Original-Host` and `Base-Url`."""

_FORWARDED_HOST_HEADERS = frozenset({b"forwarded", b"proxy", b"x-forwarded"})
"""More headers that name a host. CGI programs use the value of `Proxy` as the address of their proxy."""

_DROPPED_PREFIXES = (b"proxy-", b"x-forwarded-")
_NON_ALPHANUMERIC = re.compile(rb"[^a-z0-9]")


def _forwarded_single_request(request: h11.Request, target: bytes) -> h11.Request:
    """Build a request to a host other than the model. It is the only request on its connection."""
    dropped = _HOP_BY_HOP | _FORWARDED_HOST_HEADERS | {b"http2-settings", b"content-length"}
    headers = [*_forwarded_headers(request, dropped), *framing_headers(request.headers)]
    return h11.Request(method=request.method, target=target, headers=[*headers, (b"connection", b"close")])


def _forwarded_headers(request: h11.Request, dropped: frozenset[bytes]) -> Headers:
    """Return the request headers that are forwarded to a host, with their names unchanged.

    Names are compared with punctuation replaced by `-`, because some servers interpret `X_Api_Key` or `X.Api.Key` as
    `X-Api-Key`.
    """
    named = connection_header_names(request)
    return [
        (original, value)
        for original, value in request.headers.raw_items()
        if (name := _NON_ALPHANUMERIC.sub(b"-", original.lower())) not in dropped
        and name not in named
        and not name.startswith(_DROPPED_PREFIXES)
        and not _names_host(name)
    ]


def _names_host(name: bytes) -> bool:
    """Return whether the words of a header's name suggest that the header, like Host, names the request's host."""
    words = frozenset(name.split(b"-")) - {b""}
    return name != b"host" and bool(words & _HOST_WORDS) and words <= _HOST_WORDS | _HOST_QUALIFIERS
