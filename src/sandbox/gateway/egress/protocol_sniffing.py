"""Detects TLS and HTTP from the first bytes, and passes the connection to the inspector or filter of its protocol.

`UnknownProtocolFilter` forwards other protocols, unless TLS or HTTP follows in their data.

Lenient servers skip or accept bytes that a strict parser treats as another protocol: NUL, unusual white space, a PROXY
header, an alert. Therefore, the first bytes are searched while they are forwarded: a request line is denied before its
line end, a ClientHello before its last byte. The search for HTTP and PROXY ends when the host sends data, unless the
client has sent a possible request: an HTTP server never sends data first, and closes the connection after its response
to bytes that it cannot parse. TLS may start later (STARTTLS).
"""

import re

from sandbox.gateway.egress.http import LINE_ENDS, TCHAR, HttpInspector, HttpRequestSearch
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, StreamFilter, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.tls import ClientHelloSearch, TlsInspector
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, UNKNOWN_PROTOCOL_BYTES_MAX

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
        self._request_searches = [HttpRequestSearch(name, port, end) for end in LINE_ENDS]
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
        """Return all data unless it contains HTTP, a PROXY header, or TLS that is ambiguous or for another host."""
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


_TLS_RECORD = b"\x16"
_TLS_PREFIX = b"\x16\x03"
_LENIENT_SPACE = rb"[ \t\v\f]"  # characters that lenient servers treat as spaces (RFC 9112 §3)
_LEADING_SPACE = rb"[ \t\v\f\r\n]*"
_TEXT = rb"[^\x00-\x08\x0a\x0e-\x1f\x7f]"  # bytes of a text line; no line end is expected after any other byte
_PARTIAL_FIRST_LINE = re.compile(rb"%s(%s+(%s%s*)?)?" % (_LEADING_SPACE, TCHAR, _LENIENT_SPACE, _TEXT))
_REQUEST_LINE = re.compile(rb"%s%s+%s[^\n]*[ \t\v\f\r]HTTP/" % (_LEADING_SPACE, TCHAR, _LENIENT_SPACE), re.IGNORECASE)
_HTTP_2_PREFACE = b"PRI * HTTP/2"


class SniffingInspector:
    """Detects the protocol of a connection to `name` from the client's first bytes.

    Waiting for these bytes does not delay a host that sends data first, because the connection to it is already open.
    """

    def __init__(self, policy: EgressPolicy, name: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._port = port
        self._received = b""
        self._delegate: ConnectionInspector | None = None

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """Wait until the protocol is known, then pass the data to the inspector of that protocol."""
        if self._delegate is not None:
            return self._delegate.client_data_received(data)
        self._received += data
        if _REQUEST_LINE.match(self._received):
            if self._received.startswith(_HTTP_2_PREFACE):
                return self._deny("HTTP/2 without TLS is not supported; use HTTP/1.1 or TLS.")
            return self._delegate_to(HttpInspector(self._policy, self._name, self._name, self._port))
        if self._received.startswith(_TLS_PREFIX):
            return self._delegate_to(TlsInspector(self._policy, self._name, self._name, self._port))
        if data and self._received == _TLS_RECORD:
            return None
        if data and _PARTIAL_FIRST_LINE.fullmatch(self._received):
            too_long = len(self._received) > CLIENT_HELLO_BYTES_MAX
            return self._deny("the connection's first line is too long.") if too_long else None
        stream_filter = UnknownProtocolFilter(self._policy, self._name, self._port, self._received, is_eof=not data)
        return Tunnel(self._name, self._port, stream_filter)

    def _delegate_to(self, inspector: ConnectionInspector) -> Tunnel | Denial | None:
        self._delegate = inspector
        return inspector.client_data_received(self._received)

    def _deny(self, reason: str) -> Denial:
        return Denial(self._name, self._port, reason)


class NestedConnectionFilter:
    """The stream filter of a tunnel that contains another connection, on which `inspector` decides.

    initial_data: data inside the tunnel that has already arrived.
    """

    def __init__(self, inspector: ConnectionInspector, initial_data: bytes) -> None:
        self._inspector = inspector
        self._initial_data = initial_data
        self._stream_filter: StreamFilter | None = None
        self._has_host_data = False

    @property
    def drops_rest(self) -> bool:
        """Whether the inner connection is allowed and its filter drops the rest of the data."""
        return self._stream_filter is not None and self._stream_filter.drops_rest

    @property
    def is_passthrough(self) -> bool:
        """Whether the inner connection is allowed and its filter forwards data without inspection."""
        return self._stream_filter is not None and self._stream_filter.is_passthrough

    @property
    def may_end_in_denied_line(self) -> bool:
        """Whether the inner connection is allowed and its filter forwards data that it still searches."""
        return self._stream_filter is not None and self._stream_filter.may_end_in_denied_line

    def start(self) -> bytes | Denial:
        """Inspect the initial data and return what to forward."""
        return self.client_data_received(self._initial_data) if self._initial_data else b""

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return no data until the inspector has selected a filter, then the output of that filter."""
        if self._stream_filter is not None:
            return self._stream_filter.client_data_received(data)
        outcome = self._inspector.client_data_received(data)
        if outcome is None or isinstance(outcome, Denial):
            return outcome or b""
        self._stream_filter = outcome.stream_filter
        if self._has_host_data:
            self._stream_filter.host_data_received()
        return self._stream_filter.start()

    def host_data_received(self) -> None:
        """Record that the host has sent data, and notify the inner connection's filter."""
        self._has_host_data = True
        if self._stream_filter is not None:
            self._stream_filter.host_data_received()


def decide_transparent_connection(policy: EgressPolicy, name: str | None, address: str, port: int) -> Tunnel | Denial:
    """Decide about a transparent connection to `name`, whose data is inspected as it arrives."""
    if name is None:
        return Denial(address, port, policy.deny_reason(address, port) or "the address is not assigned to a host name.")
    reason = policy.deny_reason(name, port)
    if reason is not None:
        return Denial(name, port, reason)
    return Tunnel(name, port, NestedConnectionFilter(SniffingInspector(policy, name, port), b""))
