"""Connections from inside to anywhere but the model. In `isolated` mode each is refused, with its name told."""

from urllib.parse import urlsplit

import h11

from sandbox.gateway import http, names
from sandbox.gateway.conversation import Phase, Reaction
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.gateway.reports import Reports, printable
from sandbox.gateway.tls_hello import read_hello

REASON = "network_mode is isolated: nothing but the model may be reached."


class HttpRefusal:
    """A request to the HTTP proxy or, transparently, to port 80 of `address`: one 403 that says why."""

    def __init__(self, address: str, port: int, reports: Reports) -> None:
        self._asked = (address, port)
        self._reports = reports
        self._side = http.client_side()
        self._is_over = False

    @property
    def phase(self) -> Phase:
        """One head, then the end."""
        return Phase.OVER if self._is_over else Phase.HEAD

    def client_sent(self, data: bytes) -> Reaction:
        """Bytes came from inside; none mean that no more will."""
        reaction = Reaction()
        if self._is_over:
            return reaction
        if not data:
            self._end(reaction)
            return reaction
        try:
            self._side.receive_data(data)
            event = self._side.next_event()
        except h11.RemoteProtocolError as error:
            answer = http.plain_refusal(error.error_status_hint, "This is not valid HTTP/1.1.")
            reaction.to_client += answer.send(self._side)
            self._end(reaction)
            return reaction
        if isinstance(event, h11.Request):
            self._asked = _asked(event) or self._asked
            reaction.to_client += http.plain_refusal(403, self._sentence()).send(self._side, event.method)
            self._end(reaction)
        return reaction

    def _sentence(self) -> str:
        host, port = self._asked
        return f"Sandbox refused {printable(host)}:{port}: {REASON}"

    def _end(self, reaction: Reaction) -> None:
        self._reports.denied(*self._asked, REASON)
        self._is_over = True
        reaction.hang_up_client = True


class TlsRefusal:
    """A connection to another port of `address`: read for the name in a ClientHello, then ended without a byte."""

    def __init__(self, address: str, port: int, reports: Reports) -> None:
        self._address = address
        self._port = port
        self._reports = reports
        self._received = b""
        self._is_over = False

    @property
    def phase(self) -> Phase:
        """One hello, then the end."""
        return Phase.OVER if self._is_over else Phase.HEAD

    def client_sent(self, data: bytes) -> Reaction:
        """Bytes came from inside; none mean that no more will."""
        reaction = Reaction()
        if self._is_over:
            return reaction
        self._received += data
        hello = read_hello(self._received)
        if hello.is_whole or not data or len(self._received) > CLIENT_HELLO_BYTES_MAX:
            self._reports.denied(hello.server_name or self._address, self._port, REASON)
            self._is_over = True
            reaction.hang_up_client = True
        return reaction


class NamesRefusal:
    """Name queries over TCP: each is answered with what `names` says."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._received = b""

    @property
    def phase(self) -> Phase:
        """All its queries must come within the time of one head."""
        return Phase.HEAD

    def client_sent(self, data: bytes) -> Reaction:
        """Bytes came from inside; none mean that no more will."""
        reaction = Reaction(hang_up_client=not data)
        self._received += data
        begin = 0
        while (end := begin + 2 + int.from_bytes(self._received[begin : begin + 2])) <= len(self._received):
            reply = refuse_name(self._received[begin + 2 : end], self._reports) or b""
            reaction.to_client += len(reply).to_bytes(2) + reply if reply else b""
            begin = end
        self._received = self._received[begin:]
        return reaction


def refuse_name(query: bytes, reports: Reports) -> bytes | None:
    """The message to send back for one name query, if any."""
    answer = names.answer(query)
    if answer.name is not None:
        reports.denied(answer.name, 53, REASON)
    return answer.message


def _asked(request: h11.Request) -> tuple[str, int] | None:
    """Where a request wants to go: by CONNECT, by an absolute target, or by its Host."""
    target = request.target.decode("ascii", errors="replace")
    host = http.header(request.headers, b"host").decode("ascii", errors="replace")
    default_port = 80
    if request.method == b"CONNECT":
        host, default_port = target, 443
    try:
        if not target.startswith("/") and "://" in target:
            parts = urlsplit(target)
            host, default_port = parts.netloc.rpartition("@")[2], 443 if parts.scheme == "https" else 80
        parts = urlsplit(f"//{host}")
        return (parts.hostname, parts.port or default_port) if parts.hostname else None
    except ValueError:
        return None
