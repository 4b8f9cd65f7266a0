"""Detects TLS and HTTP from the first bytes, and passes the connection to the inspector or filter of its protocol."""

import re

from sandbox.gateway.egress.http_inspector import HttpInspector
from sandbox.gateway.egress.http_request_search import TCHAR
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, StreamFilter, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.tls_inspector import TlsInspector
from sandbox.gateway.egress.unknown_protocol_filter import UnknownProtocolFilter
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX

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
            return self._delegate_to(HttpInspector(self._policy, self._name, self._name, self._port), data)
        if self._received.startswith(_TLS_PREFIX):
            return self._delegate_to(TlsInspector(self._policy, self._name, self._name, self._port), data)
        if data and self._received == _TLS_RECORD:
            return None
        if data and _PARTIAL_FIRST_LINE.fullmatch(self._received):
            too_long = len(self._received) > CLIENT_HELLO_BYTES_MAX
            return self._deny("the connection's first line is too long.") if too_long else None
        stream_filter = UnknownProtocolFilter(self._policy, self._name, self._port, self._received, is_eof=not data)
        return Tunnel(self._name, self._port, stream_filter)

    def _delegate_to(self, inspector: ConnectionInspector, data: bytes) -> Tunnel | Denial | None:
        self._delegate = inspector
        outcome = inspector.client_data_received(self._received)
        return outcome if outcome is not None or data else inspector.client_data_received(b"")

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


def open_transparent_tunnel(policy: EgressPolicy, name: str | None, address: str, port: int) -> Tunnel | Denial:
    """Open a transparent connection to `name` before the client has sent data, and inspect the data as it arrives."""
    if name is None:
        return Denial(address, port, policy.deny_reason(address, port) or "the address is not assigned to a host name.")
    reason = policy.deny_reason(name, port)
    if reason is not None:
        return Denial(name, port, reason)
    return Tunnel(name, port, NestedConnectionFilter(SniffingInspector(policy, name, port), b""))
