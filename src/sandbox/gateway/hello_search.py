"""Looks for a TLS ClientHello that begins somewhere in what a client says, as after STARTTLS."""

import re

import msgspec

from sandbox.gateway.egress import EgressPolicy, normal
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, HELLOS_BEGUN_MAX, UNKNOWN_OPENING_BYTES_MAX
from sandbox.gateway.tls_hello import names_in

_BEGIN = re.compile(rb"\x16(?=[\x00-\x0f].[\x00-\x40].\x01)", re.DOTALL)
_BEGIN_BYTES = 6
_RECORD_HEADER = re.compile(rb"[\x14-\x16][\x00-\x0f].[\x00-\x40].", re.DOTALL)
"""Some servers take an alert or a change of the cipher between the records of a hello, and look at the version in
the hello only, where its first byte is 3."""

_HEADER_BYTES = 5
_HANDSHAKE = 22
_SHORTEST_BODY_BYTES = 39
_LONGEST_BODY_BYTES = 0x2FFFF


class _Begun(msgspec.Struct, frozen=True):
    """What there is of a ClientHello. `is_whole`: all of it, and of the records that it stands in."""

    message: bytes
    is_whole: bool


class HelloSearch:
    """For one client that speaks to `name`. A hello may name nobody, as the protocol around it did not."""

    def __init__(self, policy: EgressPolicy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._searched = 0
        self._offsets: list[int] = []

    def objection(self, seen: bytearray) -> str | None:
        """What is wrong with a hello in all that the client has said so far."""
        self._find_beginnings(seen)
        if len(self._offsets) > HELLOS_BEGUN_MAX:
            return "TLS seems to begin in it too often."
        for offset in tuple(self._offsets):
            begun = _read(seen, offset)
            objection = None
            if begun is None or begun.is_whole:
                self._offsets.remove(offset)
                objection = self._mismatch(begun.message) if begun is not None else None
            elif len(seen) - offset >= CLIENT_HELLO_BYTES_MAX:
                objection = f"the connection to {self._name} has TLS that does not come to its end."
            if objection is not None:
                return objection
        return None

    def _find_beginnings(self, seen: bytearray) -> None:
        last = UNKNOWN_OPENING_BYTES_MAX - CLIENT_HELLO_BYTES_MAX
        while (begin := _BEGIN.search(seen, self._searched)) is not None and begin.start() <= last:
            self._searched = begin.end()
            self._offsets.append(begin.start())
        self._searched = max(self._searched, len(seen) - _BEGIN_BYTES + 1)

    def _mismatch(self, message: bytes) -> str | None:
        end = _end(message)
        told = names_in(message[4:end])
        if told is None or len(message) != end or len(told.names) > 1:
            return f"the connection to {self._name} has TLS that servers read differently."
        if told.names and normal(told.names[0]) != normal(self._name):
            return f"the connection is to {self._name}, but its TLS asks for another server."
        if told.hides_name and not self._policy.takes_hidden_names:
            return "its TLS has a second server name that is encrypted (ECH); turn that off in the program."
        return None


def _read(seen: bytearray, offset: int) -> _Begun | None:
    """The ClientHello whose first record begins here; None where there is none."""
    message = bytearray()
    while len(header := bytes(seen[offset : offset + _HEADER_BYTES])) == _HEADER_BYTES:
        if _RECORD_HEADER.match(header) is None:
            return None
        end = offset + _HEADER_BYTES + int.from_bytes(header[3:])
        if header[0] == _HANDSHAKE:
            message += seen[offset + _HEADER_BYTES : end]
        if not _is_hello_so_far(message):
            return None
        offset = end
        if offset <= len(seen) and 4 <= _end(message) <= len(message):
            return _Begun(bytes(message), is_whole=True)
    return _Begun(bytes(message), is_whole=False)


def _end(message: bytes | bytearray) -> int:
    """Where the message ends; 0 while that is not known."""
    return 4 + int.from_bytes(message[1:4]) if len(message) >= 4 else 0


def _is_hello_so_far(message: bytes | bytearray) -> bool:
    is_length = len(message) < 4 or _SHORTEST_BODY_BYTES <= int.from_bytes(message[1:4]) <= _LONGEST_BODY_BYTES
    return message[:1] in (b"", b"\x01") and is_length and message[4:5] in (b"", b"\x03")
