"""A connection at another port than 80 and 443: what HTTP or TLS says of its host must agree.

Another protocol passes, and is searched for the two as it begins.
"""

import re

from sandbox.gateway.egress import Checked, EgressPolicy, Opening, Passage, Refusal
from sandbox.gateway.http_opening import HttpOpening
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.gateway.tls_opening import TlsOpening
from sandbox.gateway.unknown_protocol import UnknownProtocol

_TLS_RECORD = b"\x16"
_TLS = b"\x16\x03"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_SPACE = rb"[ \t\v\f]"  # what lenient servers take for one (RFC 9112 §3)
_BEFORE = rb"[ \t\v\f\r\n]*"
_TEXT = rb"[^\x00-\x08\x0a\x0e-\x1f\x7f]"  # with other bytes it is no line, and its client may wait for an answer
_FIRST_LINE_BEGUN = re.compile(rb"%s(%s+(%s%s*)?)?" % (_BEFORE, _TOKEN, _SPACE, _TEXT))
_REQUEST_LINE = re.compile(rb"%s%s+%s[^\n]*[ \t\v\f\r]HTTP/" % (_BEFORE, _TOKEN, _SPACE), re.IGNORECASE)
_HTTP_2 = b"PRI * HTTP/2"


class AnyOpening:
    """To `name`. Looks at what the client says first; where the host speaks first it has spoken by then."""

    def __init__(self, policy: EgressPolicy, name: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._port = port
        self._received = b""
        self._proper: Opening | None = None

    def client_sent(self, data: bytes) -> Passage | Refusal | None:
        """Wait until it is clear which protocol this is, then for what that one's opening waits for."""
        if self._proper is not None:
            return self._proper.client_sent(data)
        self._received += data
        if _REQUEST_LINE.match(self._received):
            if self._received.startswith(_HTTP_2):
                return self._refuse("HTTP/2 without TLS is not looked into; use HTTP/1.1 or TLS.")
            return self._go_on(HttpOpening(self._policy, self._name, self._name, self._port), data)
        if self._received.startswith(_TLS):
            return self._go_on(TlsOpening(self._policy, self._name, self._name, self._port), data)
        if data and self._received == _TLS_RECORD:
            return None
        if data and _FIRST_LINE_BEGUN.fullmatch(self._received):
            too_long = len(self._received) > CLIENT_HELLO_BYTES_MAX
            return self._refuse("its first line does not come to an end.") if too_long else None
        sieve = UnknownProtocol(self._policy, self._name, self._port, self._received, is_ended=not data)
        return Passage(self._name, self._port, sieve)

    def _go_on(self, proper: Opening, data: bytes) -> Passage | Refusal | None:
        self._proper = proper
        outcome = proper.client_sent(self._received)
        return outcome if outcome is not None or data else proper.client_sent(b"")

    def _refuse(self, reason: str) -> Refusal:
        return Refusal(self._name, self._port, reason)


def open_at_once(policy: EgressPolicy, name: str | None, shown: str, port: int) -> Passage | Refusal:
    """Let a transparent connection through to `name` before it has said anything, and look at it as it speaks."""
    if name is None:
        return Refusal(shown, port, policy.objection(shown, port) or "it is no address that its name resolved to.")
    objection = policy.objection(name, port)
    if objection is not None:
        return Refusal(name, port, objection)
    return Passage(name, port, Checked(AnyOpening(policy, name, port), b""))
