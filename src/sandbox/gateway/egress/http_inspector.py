"""A plain HTTP request to a host. Its Host header must name that host, and its connection carries only that request."""

import re
from typing import Any

import h11

from sandbox.gateway import forwarded_http_heads, local_responses
from sandbox.gateway.egress.http_request_target import HostPort, parse_authority
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy, denial_message, normalize_host
from sandbox.gateway.forwarded_http_heads import connection_header_names

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
        self._client_side = forwarded_http_heads.create_client_side()

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
        return open_single_request_tunnel(
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
        response = local_responses.plain_text_error(status, denial_message(host, port, reason)).encode(
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
        self._upstream_side = forwarded_http_heads.create_upstream_side()
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


def open_single_request_tunnel(
    client_side: h11.Connection, request: h11.Request, target: bytes, authority: HostPort
) -> Tunnel | Denial:
    """Return a tunnel to `authority` for a request that the policy allows, or a denial if the request is ambiguous."""
    reason = _ambiguity(request)
    if reason is not None:
        response = local_responses.plain_text_error(400, denial_message(authority.host, authority.port, reason)).encode(
            client_side, request.method
        )
        return Denial(authority.host, authority.port, reason, response)

    def unreachable_response(status: int, message: str) -> bytes:
        return local_responses.plain_text_error(status, message).encode(client_side, request.method)

    return Tunnel(
        authority.host,
        authority.port,
        SingleRequestFilter(client_side, forwarded_http_heads.forwarded_single_request(request, target), authority),
        unreachable_response=unreachable_response,
    )


def _ambiguity(request: h11.Request) -> str | None:
    """Return why two parsers may interpret the request differently, or None."""
    names = {name for name, _ in request.headers}
    if {b"transfer-encoding", b"content-length"} <= names:
        return "a request must not have both Content-Length and Transfer-Encoding."
    if (
        b"content-length" in names
        and _LENGTH.fullmatch(forwarded_http_heads.header(request.headers, b"content-length")) is None
    ):
        return "Content-Length must have at most 18 digits, without leading zeros."
    if b"host" in connection_header_names(request):
        return "the Connection header must not list Host."
    return None
