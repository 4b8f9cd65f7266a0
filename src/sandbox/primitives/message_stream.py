"""Messages on a byte stream: the length of each message, then the message in MessagePack."""

import struct
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from typing import TypeVar

import msgspec

from sandbox.model.errors import DECODE_ERRORS

T = TypeVar("T")
StreamPair = tuple[StreamReader, StreamWriter]
"""Both directions of a connection."""

_LENGTH = struct.Struct("!I")


class InvalidMessageError(ValueError):
    """The peer sent a message that is too large or malformed."""


def encode_message(message: msgspec.Struct) -> bytes:
    """Return the bytes of a message."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_message(reader: StreamReader, decoder: "msgspec.msgpack.Decoder[T]", bytes_max: int) -> T | None:
    """Return the next message; None at the end of the stream. Raises OSError, InvalidMessageError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > bytes_max:
            raise InvalidMessageError(f"a message has {length} bytes, more than {bytes_max}")
        body = await reader.readexactly(length)
    except IncompleteReadError:
        return None
    try:
        return decoder.decode(body)
    except DECODE_ERRORS as error:
        raise InvalidMessageError(f"a message is malformed: {error}") from error
