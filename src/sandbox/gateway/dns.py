"""Addresses inside that stand for names outside: each allowed name gets one, and keeps it."""

from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec

from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.event_reporter import Reports
from sandbox.gateway.limits import NAMES_MAX
from sandbox.gateway.protocol import Phase, Reaction

_FIRST = int(IPv4Address("198.18.0.0"))
_HOSTS = 254
"""Addresses of a block of 256 that are used: neither .0 nor .255, which some programs take for a network's own."""


class NameAddresses:
    """Hands out 198.18.0.2, 198.18.0.3, … to names for which `is_known` says yes; 198.18.0.1 is the resolver's."""

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._addresses: dict[str, IPv4Address] = {}
        self._names: dict[IPv4Address, str] = {}

    def address_of(self, name: str) -> IPv4Address | None:
        """The address that stands for a name (any case); None for one that is not known, and over the bound."""
        spelt, name = name, name.lower()
        if name not in self._addresses:
            if not self._is_known(name) or len(self._addresses) >= NAMES_MAX:
                return None
            block, host = divmod(len(self._addresses) + 1, _HOSTS)
            address = IPv4Address(_FIRST + block * 256 + host + 1)
            self._addresses[name], self._names[address] = address, spelt
        return self._addresses[name]

    def name_of(self, address: str) -> str | None:
        """The name that an address was handed out to, spelt as it was asked for, so that secrets in it are known."""
        return self._names.get(IPv4Address(address))


_HEADER_BYTES = 12
_RESPONSE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0100, 0x0080
_OPCODE = 0x7800
_FOUND, _MALFORMED, _NO_SUCH_NAME, _NOT_OFFERED = 0, 1, 3, 4
_TYPE_A, _CLASS_IN = 1, 1
_SECONDS_TO_LIVE = 60
_LABEL_BYTES_MAX = 63
_NAME_BYTES_MAX = 255


AddressOf = Callable[[str], IPv4Address | None]


class Answer(msgspec.Struct, frozen=True):
    """The message to send back, None for silence, and the name that was refused, None where there was none."""

    message: bytes | None
    refused: str | None = None


def answer(query: bytes, address_of: AddressOf) -> Answer:
    """Answer one message, whatever is in it. Never raises; the answer is at most an address longer than the query."""
    if len(query) < _HEADER_BYTES:
        return Answer(None)
    flags = int.from_bytes(query[2:4])
    if flags & _RESPONSE:
        return Answer(None)  # answering answers is how two resolvers talk for ever
    if flags & _OPCODE:
        return Answer(_message(query, flags, _NOT_OFFERED))
    question = _question(query) if int.from_bytes(query[4:6]) == 1 else None
    if question is None:
        return Answer(_message(query, flags, _MALFORMED))
    name, end = question
    asked = query[_HEADER_BYTES:end]
    address = address_of(name)
    if address is None:
        return Answer(_message(query, flags, _NO_SUCH_NAME, asked), name)
    is_for_address = asked[-4:] == _TYPE_A.to_bytes(2) + _CLASS_IN.to_bytes(2)
    return Answer(_message(query, flags, _FOUND, asked, address if is_for_address else None))


def _message(query: bytes, flags: int, code: int, question: bytes = b"", address: IPv4Address | None = None) -> bytes:
    kept = flags & (_OPCODE | _RECURSION_DESIRED)
    head = (kept | _RESPONSE | _RECURSION_AVAILABLE | code).to_bytes(2)
    counts = (1 if question else 0).to_bytes(2) + (1 if address else 0).to_bytes(2) + bytes(4)
    return query[:2] + head + counts + question + (_record(address) if address else b"")


def _record(address: IPv4Address) -> bytes:
    """An answer for the name of the question, which stands right behind the header."""
    name = (0xC000 | _HEADER_BYTES).to_bytes(2)
    kind = _TYPE_A.to_bytes(2) + _CLASS_IN.to_bytes(2)
    return name + kind + _SECONDS_TO_LIVE.to_bytes(4) + (4).to_bytes(2) + address.packed


def _question(query: bytes) -> tuple[str, int] | None:
    """The name of the one question and where the question ends; None when it is malformed."""
    labels: list[str] = []
    offset = _HEADER_BYTES
    while offset < len(query):
        length = query[offset]
        offset += 1
        if length == 0:
            is_whole = offset + 4 <= len(query) and offset - _HEADER_BYTES <= _NAME_BYTES_MAX
            return (".".join(labels) or ".", offset + 4) if is_whole else None
        if length > _LABEL_BYTES_MAX or offset + length > len(query):
            return None
        labels.append(query[offset : offset + length].decode("ascii", errors="replace"))
        offset += length
    return None


_NAMES_PORT = 53


class NameService:
    """Answers one query. Names that may not be reached do not exist, and are told."""

    def __init__(self, policy: EgressPolicy, addresses: NameAddresses, reports: Reports) -> None:
        self._policy = policy
        self._addresses = addresses
        self._reports = reports

    def answer(self, query: bytes) -> bytes | None:
        """The message to send back, if any."""
        response = answer(query, self._addresses.address_of)
        if response.refused is not None:
            reason = self._policy.name_objection(response.refused)
            self._reports.denied(response.refused, _NAMES_PORT, reason)
        return response.message


class NamesConversation:
    """Any number of queries, each behind its length."""

    def __init__(self, service: NameService) -> None:
        self._service = service
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
            reply = self._service.answer(self._received[begin + 2 : end]) or b""
            reaction.to_client += len(reply).to_bytes(2) + reply if reply else b""
            begin = end
        self._received = self._received[begin:]
        return reaction
