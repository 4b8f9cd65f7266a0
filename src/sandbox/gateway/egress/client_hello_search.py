"""Finds a TLS ClientHello in the data of an unknown protocol."""

import re

import msgspec

from sandbox.gateway.egress.client_hello import RECORD_HEADER_BYTES, parse_server_names
from sandbox.gateway.egress.policy import EgressPolicy, normalize_host
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, PARTIAL_HELLOS_MAX, UNKNOWN_PROTOCOL_BYTES_MAX

_HELLO_START = re.compile(rb"\x16(?=[\x00-\x0f].[\x00-\x40].\x01)", re.DOTALL)
_HELLO_START_BYTES = 6
_RECORD_HEADER = re.compile(rb"[\x14-\x16][\x00-\x0f].[\x00-\x40].", re.DOTALL)
"""Matches the records that lenient servers accept: some allow an alert or a ChangeCipherSpec between a hello's records.

Lenient servers check the version only in the hello, where its first byte is 3.
"""

_HANDSHAKE = 22
_BODY_BYTES_MIN = 39
_BODY_BYTES_MAX = 0x2FFFF


class _PartialHello(msgspec.Struct, frozen=True):
    """The available part of a ClientHello. is_complete: the message and its records have arrived in full."""

    message: bytes
    is_complete: bool


class ClientHelloSearch:
    """Looks for a ClientHello in the bytes from a client that is connecting to `name`.

    The hello may omit the server name, because the surrounding protocol does not contain one either.
    """

    def __init__(self, policy: EgressPolicy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._searched = 0
        self._offsets: list[int] = []

    def deny_reason(self, received: bytearray) -> str | None:
        """Return why a hello in the bytes received so far is denied, or None."""
        self._find_offsets(received)
        if len(self._offsets) > PARTIAL_HELLOS_MAX:
            return "the connection contains too many possible TLS ClientHellos."
        for offset in tuple(self._offsets):
            partial_hello = _read_partial_hello(received, offset)
            reason = None
            if partial_hello is None or partial_hello.is_complete:
                self._offsets.remove(offset)
                reason = self._mismatch(partial_hello.message) if partial_hello is not None else None
            elif len(received) - offset >= CLIENT_HELLO_BYTES_MAX:
                reason = f"the connection to {self._name} contains an incomplete TLS ClientHello."
            if reason is not None:
                return reason
        return None

    def _find_offsets(self, received: bytearray) -> None:
        last = UNKNOWN_PROTOCOL_BYTES_MAX - CLIENT_HELLO_BYTES_MAX
        while (begin := _HELLO_START.search(received, self._searched)) is not None and begin.start() <= last:
            self._searched = begin.end()
            self._offsets.append(begin.start())
        self._searched = max(self._searched, len(received) - _HELLO_START_BYTES + 1)

    def _mismatch(self, message: bytes) -> str | None:
        end = _message_end(message)
        server_names = parse_server_names(message[4:end])
        if server_names is None or len(message) != end or len(server_names.names) > 1:
            return f"the connection to {self._name} contains a TLS ClientHello that servers may interpret differently."
        if server_names.names and normalize_host(server_names.names[0]) != normalize_host(self._name):
            return f"the connection is to {self._name}, but its TLS handshake names another server (SNI)."
        if server_names.has_encrypted_name and not self._policy.allows_encrypted_hello:
            return "the TLS ClientHello contains a second, encrypted server name (ECH); disable ECH in the program."
        return None


def _read_partial_hello(received: bytearray, offset: int) -> _PartialHello | None:
    """Return the ClientHello whose first record starts at `offset`, or None if there is none."""
    message = bytearray()
    while len(header := bytes(received[offset : offset + RECORD_HEADER_BYTES])) == RECORD_HEADER_BYTES:
        if _RECORD_HEADER.match(header) is None:
            return None
        end = offset + RECORD_HEADER_BYTES + int.from_bytes(header[3:])
        if header[0] == _HANDSHAKE:
            message += received[offset + RECORD_HEADER_BYTES : end]
        if not _may_be_hello(message):
            return None
        offset = end
        if offset <= len(received) and 4 <= _message_end(message) <= len(message):
            return _PartialHello(bytes(message), is_complete=True)
    return _PartialHello(bytes(message), is_complete=False)


def _message_end(message: bytes | bytearray) -> int:
    """Return the end offset of the message, or 0 while it is unknown."""
    return 4 + int.from_bytes(message[1:4]) if len(message) >= 4 else 0


def _may_be_hello(message: bytes | bytearray) -> bool:
    has_plausible_length = len(message) < 4 or _BODY_BYTES_MIN <= int.from_bytes(message[1:4]) <= _BODY_BYTES_MAX
    return message[:1] in (b"", b"\x01") and has_plausible_length and message[4:5] in (b"", b"\x03")
