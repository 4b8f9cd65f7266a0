"""Forwards protocols other than TLS and HTTP, unless TLS or HTTP follows in their data.

Lenient servers skip or accept bytes that a strict parser treats as another protocol: NUL, unusual white space, a PROXY
header, an alert. Therefore the first bytes are searched while they are forwarded: a request line is denied before its
line end, a ClientHello before its last byte. HTTP and PROXY are searched for until the host has sent data: an HTTP
server never sends data first, and closes the connection after its response to bytes that it cannot parse. TLS may start
later (STARTTLS).
"""

import re

from sandbox.gateway.egress.client_hello_search import ClientHelloSearch
from sandbox.gateway.egress.http_request_search import LINE_ENDS, HttpRequestSearch
from sandbox.gateway.egress.inspector_interface import Denial
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.limits import UNKNOWN_PROTOCOL_BYTES_MAX

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
