"""Answers name queries (RFC 1035) by itself: only names that may be reached exist. Nobody else is ever asked."""

from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec

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
