"""A request to the HTTP proxy: a CONNECT tunnel, or a plain request with an absolute-form target."""

from typing import Any

import h11

from sandbox.gateway import http_messages
from sandbox.gateway.egress.http import (
    HostPort,
    HttpInspector,
    create_single_request_tunnel,
    parse_absolute_form,
    parse_authority,
)
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, Tunnel
from sandbox.gateway.egress.policy import HTTP_PORT, HTTPS_PORT, EgressPolicy, denial_message, normalize_host
from sandbox.gateway.egress.protocol_sniffing import NestedConnectionFilter, SniffingInspector
from sandbox.gateway.egress.tls import TlsInspector

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class ProxyInspector:
    """Inspects the first request of a connection to the proxy on `port`."""

    def __init__(self, policy: EgressPolicy, port: int) -> None:
        self._policy = policy
        self._target = HostPort("proxy", port)
        self._client_side = http_messages.create_server_state()

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """Wait for a complete request head and check it."""
        try:
            self._client_side.receive_data(data)
            event: Any = self._client_side.next_event()
        except h11.RemoteProtocolError:
            return self._deny("this is not valid HTTP/1.1.", status=400)
        if not isinstance(event, h11.Request):
            return None if data else Denial(self._target.host, self._target.port, "the request is incomplete.")
        return self._open_tunnel(event) if event.method == b"CONNECT" else self._forward_plain(event)

    def _open_tunnel(self, request: h11.Request) -> Tunnel | Denial:
        target = parse_authority(request.target, default_port=HTTPS_PORT)
        if target is None or http_messages.has_body(request):
            return self._deny("A CONNECT request must have a host and a port, and must not have a body.", status=400)
        self._target = target
        reason = self._policy.deny_reason(target.host, target.port)
        if reason is not None:
            return self._deny(reason)
        inner_inspector = self._inner_inspector(target)
        return Tunnel(
            target.host,
            target.port,
            NestedConnectionFilter(inner_inspector, self._client_side.trailing_data[0]),
            established_response=_ESTABLISHED,
            unreachable_response=lambda status, message: http_messages.plain_text_error(status, message).encode(
                self._client_side
            ),
        )

    def _inner_inspector(self, target: HostPort) -> ConnectionInspector:
        if target.port not in (HTTP_PORT, HTTPS_PORT):
            return SniffingInspector(self._policy, target.host, target.port)
        kind = HttpInspector if target.port == HTTP_PORT else TlsInspector
        return kind(self._policy, target.host, target.host, target.port)

    def _forward_plain(self, request: h11.Request) -> Tunnel | Denial:
        target = parse_absolute_form(request.target)
        if target is None:
            reason = "a proxy request must use CONNECT, or an absolute URL without a user name."
            return self._deny(reason, request.method, status=400)
        self._target = authority = target.authority
        hosts = [value for name, value in request.headers if name == b"host"]
        named = parse_authority(hosts[0], default_port=80) if len(hosts) == 1 else None
        deny_reason = self._policy.deny_reason(authority.host, authority.port)
        if deny_reason is None and (target.scheme != "http" or authority.port == HTTPS_PORT):
            deny_reason = "the proxy accepts https only with CONNECT."
        if deny_reason is None and (
            named is None
            or (normalize_host(named.host), named.port) != (normalize_host(authority.host), authority.port)
        ):
            deny_reason = "the Host header and the request target specify different hosts."
        if deny_reason is not None:
            return self._deny(deny_reason, request.method)
        return create_single_request_tunnel(self._client_side, request, target.path, authority)

    def _deny(self, reason: str, method: bytes = b"", status: int = 403) -> Denial:
        host, port = self._target.host, self._target.port
        response = http_messages.plain_text_error(status, denial_message(host, port, reason)).encode(
            self._client_side, method
        )
        return Denial(host, port, reason, response)
