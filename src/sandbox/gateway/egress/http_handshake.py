"""A plain HTTP request to a host: its Host header must be that host's, and it is the only one on its connection."""

from typing import Any

import h11

from sandbox.gateway import http
from sandbox.gateway.egress.policy import EgressPolicy, Passage, Refusal, normal, sentence
from sandbox.gateway.http import Authority, parse_authority
from sandbox.gateway.model.request_policy import named_by_connection

_MALFORMED = "this is not valid HTTP/1.1."


class HttpOpening:
    """To `name`; None stands for an address, `shown`, that no name was given."""

    def __init__(self, policy: EgressPolicy, name: str | None, shown: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._shown = shown
        self._port = port
        self._side = http.client_side()

    def client_sent(self, data: bytes) -> Passage | Refusal | None:
        """Wait for a whole head."""
        try:
            self._side.receive_data(data)
            event: Any = self._side.next_event()
        except h11.RemoteProtocolError:
            return self._refuse(self._name or self._shown, self._port, _MALFORMED, status=400)
        if isinstance(event, h11.Request):
            return self._judge(event)
        return None if data else Refusal(self._name or self._shown, self._port, _MALFORMED)

    def _judge(self, request: h11.Request) -> Passage | Refusal:
        asked = self._asked(request)
        if asked is None:
            reason = "the request names no host, or not one only."
            return self._refuse(self._name or self._shown, self._port, reason, request.method, status=400)
        objection = self._policy.objection(self._name or asked.host, self._port) or self._mismatch(asked, request)
        if objection is not None:
            return self._refuse(asked.host, asked.port, objection, request.method)
        return lone_passage(self._side, request, request.target, Authority(self._name or asked.host, self._port))

    def _asked(self, request: h11.Request) -> Authority | None:
        hosts = [value for name, value in request.headers if name == b"host"]
        return parse_authority(hosts[0], default_port=self._port) if len(hosts) == 1 else None

    def _mismatch(self, asked: Authority, request: h11.Request) -> str | None:
        if self._name is None:
            return f"{self._shown} is no address that its name resolved to."
        if (normal(asked.host), asked.port) != (normal(self._name), self._port):
            return f"the connection is to {self._name}, but its Host header asks for another."
        if not request.target.startswith(b"/") and request.target != b"*":
            return "a request that does not go to a proxy begins its target with a slash."
        return None

    def _refuse(self, host: str, port: int, reason: str, method: bytes = b"", status: int = 403) -> Refusal:
        answer = http.plain_refusal(status, sentence(host, port, reason)).send(self._side, method)
        return Refusal(host, port, reason, answer)


class LoneRequest:
    """Lets one request through, framed anew, and nothing after it."""

    is_free = False

    def __init__(self, side: h11.Connection, request: h11.Request, to: Authority) -> None:
        self._side = side
        self._to = to
        self._onward = http.upstream_side()
        self._head = self._onward.send(request) or b""
        self.is_over = False

    def begin(self) -> bytes | Refusal:
        """The head, and what came of the body with it."""
        body = self._pass()
        return body if isinstance(body, Refusal) else self._head + body

    def client_sent(self, data: bytes) -> bytes | Refusal:
        """What belongs to the request's body."""
        if self.is_over:
            return b""
        try:
            self._side.receive_data(data)
        except h11.RemoteProtocolError:
            return Refusal(self._to.host, self._to.port, _MALFORMED)
        return self._pass()

    def host_spoke(self) -> None:
        """An answer may come before the request has ended."""

    def _pass(self) -> bytes | Refusal:
        onward = bytearray()
        try:
            while not self.is_over:
                event: Any = self._side.next_event()
                if event in (h11.NEED_DATA, h11.PAUSED):
                    break
                if isinstance(event, h11.EndOfMessage):
                    event = h11.EndOfMessage()  # without trailers
                    self.is_over = True
                onward += self._onward.send(event) or b""
        except h11.ProtocolError:
            return Refusal(self._to.host, self._to.port, _MALFORMED)
        return bytes(onward)


def lone_passage(side: h11.Connection, request: h11.Request, target: bytes, to: Authority) -> Passage | Refusal:
    """Let a request that was found good through to `to`."""
    reason = _ambiguity(request)
    if reason is not None:
        answer = http.plain_refusal(400, sentence(to.host, to.port, reason)).send(side, request.method)
        return Refusal(to.host, to.port, reason, answer)

    def unreached(status: int, told: str) -> bytes:
        return http.plain_refusal(status, told).send(side, request.method)

    return Passage(to.host, to.port, LoneRequest(side, http.lone_request(request, target), to), unreached=unreached)


def _ambiguity(request: h11.Request) -> str | None:
    """What two readers of the request may understand differently."""
    names = {name for name, _ in request.headers}
    if {b"transfer-encoding", b"content-length"} <= names:
        return "a request has either Content-Length or Transfer-Encoding, not both."
    if b"host" in named_by_connection(request):
        return "Connection must not name Host, without which nobody knows what is asked for."
    return None
