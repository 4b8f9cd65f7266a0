"""Answers name queries (RFC 1035) by itself: in `isolated` mode no name exists. Nobody else is ever asked."""

from dataclasses import dataclass

_HEADER_BYTES = 12
_RESPONSE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0100, 0x0080
_OPCODE = 0x7800
_MALFORMED, _NO_SUCH_NAME, _NOT_OFFERED = 1, 3, 4
_LABEL_BYTES_MAX = 63
_NAME_BYTES_MAX = 255


@dataclass(frozen=True, slots=True)
class Answer:
    """The message to send back, None for silence, and the name that was asked for, None where there was none."""

    message: bytes | None
    name: str | None = None


def answer(query: bytes) -> Answer:
    """Answer one message, whatever is in it. Never raises; the answer is never longer than the query."""
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
    return Answer(_message(query, flags, _NO_SUCH_NAME, query[_HEADER_BYTES:end]), name)


def _message(query: bytes, flags: int, code: int, question: bytes = b"") -> bytes:
    kept = flags & (_OPCODE | _RECURSION_DESIRED)
    head = (kept | _RESPONSE | _RECURSION_AVAILABLE | code).to_bytes(2)
    counts = (1 if question else 0).to_bytes(2) + bytes(6)
    return query[:2] + head + counts + question


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
