"""A TLS connection to a host: the server's name in its ClientHello must be that host's."""

from collections.abc import Callable

from sandbox.gateway.egress.client_hello import Hello, read_hello
from sandbox.gateway.egress.policy import EgressPolicy, Passage, Refusal, is_address, normal
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX


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
        return Passage(wanted, self._port, SecondHello(self._received, hello, self._judge_again))

    def _judge_again(self, hello: Hello) -> Refusal | None:
        objection = self._mismatch(hello)
        return None if objection is None else Refusal(hello.server_name or self._shown, self._port, objection)

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


_MEANINGLESS = frozenset({20, 21})
"""Records that may stand between two hellos, as often as somebody likes: changes of the cipher, and alerts."""

_DATA = 23
_HEADER_BYTES = 5


class SecondHello:
    """Lets everything through but a second ClientHello that names another server.

    A server of TLS 1.3 may ask for one (RFC 8446 §4.1.4), and might serve whom that names. After it all is encrypted.
    Data that the client sends before the server has answered may stand between the two as well.
    """

    is_over = False

    def __init__(self, received: bytes, first: Hello, judge: Callable[[Hello], Refusal | None]) -> None:
        self._first = received[: first.byte_count]
        self._waiting = received[first.byte_count :]
        self._between = _MEANINGLESS | {_DATA} if first.is_before_data else _MEANINGLESS
        self._between_bytes = 0
        self._judge = judge
        self._has_passed = not first.byte_count

    @property
    def is_free(self) -> bool:
        """Whether there is nothing more to look for."""
        return self._has_passed

    def begin(self) -> bytes | Refusal:
        """The first one, and what came behind it."""
        behind, self._waiting = self._waiting, b""
        onward = self.client_sent(behind) if behind else b""
        return onward if isinstance(onward, Refusal) else self._first + onward

    def client_sent(self, data: bytes) -> bytes | Refusal:
        """All of it, as soon as it is known to be no other hello."""
        if self._has_passed:
            return data
        self._waiting += data
        between = self._take_between()
        hello = read_hello(self._waiting)
        is_known = hello.is_whole and self._waiting[0] not in self._between
        if data and not is_known and len(self._waiting) <= CLIENT_HELLO_BYTES_MAX:
            return between
        is_another = hello.byte_count > 0 or not hello.is_whole
        refusal = self._judge(hello) if is_another and data else None
        if refusal is not None:
            return refusal
        onward, self._waiting, self._has_passed = between + self._waiting, b"", True
        return onward

    def host_spoke(self) -> None:
        """It may ask for a second hello; what follows is looked at in any case."""

    def _take_between(self) -> bytes:
        """What has come of the records that may stand between; the header of the last one is whole."""
        end = 0
        while True:
            came = min(self._between_bytes, len(self._waiting) - end)
            self._between_bytes -= came
            end += came
            header = self._waiting[end : end + _HEADER_BYTES]
            if self._between_bytes or len(header) < _HEADER_BYTES or header[0] not in self._between:
                break
            self._between_bytes = _HEADER_BYTES + int.from_bytes(header[3:])
        taken, self._waiting = self._waiting[:end], self._waiting[end:]
        return taken
