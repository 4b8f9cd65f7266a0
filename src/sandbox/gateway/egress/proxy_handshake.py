"""A request to the HTTP proxy: a tunnel by CONNECT, or a plain request with an absolute target."""

from typing import Any

import h11

from sandbox.gateway import http
from sandbox.gateway.egress.http_handshake import HttpOpening, lone_passage
from sandbox.gateway.egress.policy import (
    HTTP_PORT,
    HTTPS_PORT,
    Checked,
    EgressPolicy,
    Opening,
    Passage,
    Refusal,
    normal,
    sentence,
)
from sandbox.gateway.egress.tls_handshake import TlsOpening
from sandbox.gateway.egress.unknown_protocol import AnyOpening
from sandbox.gateway.http import Authority, parse_absolute, parse_authority

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class ProxyOpening:
    """The first request of a connection to the proxy on `port`."""

    def __init__(self, policy: EgressPolicy, port: int) -> None:
        self._policy = policy
        self._asked = Authority("proxy", port)
        self._side = http.client_side()

    def client_sent(self, data: bytes) -> Passage | Refusal | None:
        """Wait for a whole head."""
        try:
            self._side.receive_data(data)
            event: Any = self._side.next_event()
        except h11.RemoteProtocolError:
            return self._refuse("this is not valid HTTP/1.1.", status=400)
        if not isinstance(event, h11.Request):
            return None if data else Refusal(self._asked.host, self._asked.port, "the request is not whole.")
        return self._tunnel(event) if event.method == b"CONNECT" else self._plain(event)

    def _tunnel(self, request: h11.Request) -> Passage | Refusal:
        wanted = parse_authority(request.target, default_port=HTTPS_PORT)
        if wanted is None or http.has_body(request):
            return self._refuse("CONNECT takes a host and a port, and no body.", status=400)
        self._asked = wanted
        objection = self._policy.objection(wanted.host, wanted.port)
        if objection is not None:
            return self._refuse(objection)
        inside = self._inside(wanted)
        return Passage(
            wanted.host,
            wanted.port,
            Checked(inside, self._side.trailing_data[0]),
            greeting=_ESTABLISHED,
            unreached=lambda status, told: http.plain_refusal(status, told).send(self._side),
        )

    def _inside(self, wanted: Authority) -> Opening:
        if wanted.port not in (HTTP_PORT, HTTPS_PORT):
            return AnyOpening(self._policy, wanted.host, wanted.port)
        kind = HttpOpening if wanted.port == HTTP_PORT else TlsOpening
        return kind(self._policy, wanted.host, wanted.host, wanted.port)

    def _plain(self, request: h11.Request) -> Passage | Refusal:
        target = parse_absolute(request.target)
        if target is None:
            reason = "a request to the proxy has CONNECT, or an absolute target without a user's name."
            return self._refuse(reason, request.method, status=400)
        self._asked = wanted = target.authority
        hosts = [value for name, value in request.headers if name == b"host"]
        named = parse_authority(hosts[0], default_port=80) if len(hosts) == 1 else None
        objection = self._policy.objection(wanted.host, wanted.port)
        if objection is None and (target.scheme != "http" or wanted.port == HTTPS_PORT):
            objection = "the proxy takes https by CONNECT only."
        if objection is None and (
            named is None or (normal(named.host), named.port) != (normal(wanted.host), wanted.port)
        ):
            objection = "the Host header asks for another host than the target."
        if objection is not None:
            return self._refuse(objection, request.method)
        return lone_passage(self._side, request, target.path, wanted)

    def _refuse(self, reason: str, method: bytes = b"", status: int = 403) -> Refusal:
        host, port = self._asked.host, self._asked.port
        answer = http.plain_refusal(status, sentence(host, port, reason)).send(self._side, method)
        return Refusal(host, port, reason, answer)
