"""A TLS connection to a host: the server's name in its ClientHello must be that host's."""

from sandbox.gateway.egress import EgressPolicy, Free, Passage, Refusal, is_address, normal
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.gateway.tls_hello import Hello, read_hello


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
            objection = self._mismatch(hello)
        if objection is not None:
            return Refusal(asked or wanted, self._port, objection)
        return Passage(wanted, self._port, Free(self._received))

    def _mismatch(self, hello: Hello) -> str | None:
        asked = hello.server_name
        if self._name is None:
            return f"{self._shown} is no address that its name resolved to."
        if not hello.is_whole:
            return f"the connection to {self._name} opens with TLS that does not come to its end."
        if asked is None and not is_address(self._name):
            return f"the connection to {self._name} does not open with TLS that names its server (SNI)."
        if asked is not None and normal(asked) != normal(self._name):
            return f"the connection is to {self._name}, but its TLS asks for another server."
        if hello.hides_name and not self._policy.takes_hidden_names:
            return "its TLS has a second server name that is encrypted (ECH); turn that off in the program."
        return None
