"""Detects TLS and HTTP from the first bytes, and passes the connection to the inspector or filter of its protocol."""

import re

from sandbox.gateway.egress.http_inspector import HttpInspector
from sandbox.gateway.egress.http_request_search import TOKEN
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, NestedConnectionFilter, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.tls_inspector import TlsInspector
from sandbox.gateway.egress.unknown_protocol_inspector import UnknownProtocolInspector
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX

_TLS_RECORD = b"\x16"
_TLS_PREFIX = b"\x16\x03"
_LENIENT_SPACE = rb"[ \t\v\f]"  # characters that lenient servers treat as spaces (RFC 9112 §3)
_LEADING_SPACE = rb"[ \t\v\f\r\n]*"
_TEXT = rb"[^\x00-\x08\x0a\x0e-\x1f\x7f]"  # bytes of a text line; no line end is expected after any other byte
_PARTIAL_FIRST_LINE = re.compile(rb"%s(%s+(%s%s*)?)?" % (_LEADING_SPACE, TOKEN, _LENIENT_SPACE, _TEXT))
_REQUEST_LINE = re.compile(rb"%s%s+%s[^\n]*[ \t\v\f\r]HTTP/" % (_LEADING_SPACE, TOKEN, _LENIENT_SPACE), re.IGNORECASE)
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
        stream_filter = UnknownProtocolInspector(self._policy, self._name, self._port, self._received, is_eof=not data)
        return Tunnel(self._name, self._port, stream_filter)

    def _delegate_to(self, inspector: ConnectionInspector, data: bytes) -> Tunnel | Denial | None:
        self._delegate = inspector
        outcome = inspector.client_data_received(self._received)
        return outcome if outcome is not None or data else inspector.client_data_received(b"")

    def _deny(self, reason: str) -> Denial:
        return Denial(self._name, self._port, reason)


def open_transparent_tunnel(policy: EgressPolicy, name: str | None, address: str, port: int) -> Tunnel | Denial:
    """Open a transparent connection to `name` before the client has sent data, and inspect the data as it arrives."""
    if name is None:
        return Denial(address, port, policy.deny_reason(address, port) or "the address is not assigned to a host name.")
    reason = policy.deny_reason(name, port)
    if reason is not None:
        return Denial(name, port, reason)
    return Tunnel(name, port, NestedConnectionFilter(SniffingInspector(policy, name, port), b""))
