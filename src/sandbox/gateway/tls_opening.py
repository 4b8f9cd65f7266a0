"""A TLS connection to a host: the server's name in its ClientHello must be that host's."""

from sandbox.gateway.egress import EgressPolicy, Free, Passage, Refusal, normal
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.gateway.tls_hello import read_hello


class TlsOpening:
    """To `name`; None stands for an address, `shown`, that no name was given. Refused without a byte."""

    def __init__(self, policy: EgressPolicy, name: str | None, shown: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._shown = shown
        self._port = port
        self._received = b""

    def client_sent(self, data: bytes) -> Passage | Refusal | None:
        """Wait for a whole ClientHello."""
        self._received += data
        hello = read_hello(self._received)
        if data and not hello.is_whole and len(self._received) <= CLIENT_HELLO_BYTES_MAX:
            return None
        asked = hello.server_name
        wanted = self._name or asked or self._shown
        objection = self._policy.objection(wanted, self._port)
        if objection is None:
            objection = self._mismatch(asked)
        if objection is not None:
            return Refusal(asked or wanted, self._port, objection)
        return Passage(wanted, self._port, Free(self._received))

    def _mismatch(self, asked: str | None) -> str | None:
        if self._name is None:
            return f"{self._shown} is no address that its name resolved to."
        if asked is None:
            return f"the connection to {self._name} does not open with TLS that names its server (SNI)."
        if normal(asked) != normal(self._name):
            return f"the connection is to {self._name}, but its TLS asks for another server."
        return None
