"""Messages on a stream are typed, limited in size, and independent of how the stream is split."""

import asyncio

import msgspec
import pytest

from sandbox.primitives.message_stream import InvalidMessageError, encode_message, read_message


class Ping(msgspec.Struct, tag="ping"):
    number: int


class Data(msgspec.Struct, tag="data"):
    data: bytes


DECODER = msgspec.msgpack.Decoder(Ping | Data)
MESSAGES = (Ping(1), Data(b"\0" * 100), Data(b""), Ping(2**40))


def reader_of(*parts):
    reader = asyncio.StreamReader(limit=16)
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    return reader


async def read_all(reader, bytes_max=1000):
    messages = []
    while (message := await read_message(reader, DECODER, bytes_max)) is not None:
        messages.append(message)
    return tuple(messages)


async def test_messages_are_read_as_they_were_written():
    data = b"".join(map(encode_message, MESSAGES))
    assert await read_all(reader_of(data)) == MESSAGES
    assert await read_all(reader_of(*(bytes([byte]) for byte in data))) == MESSAGES


@pytest.mark.parametrize("length", range(len(encode_message(Ping(1)))))
async def test_incomplete_message_ends_the_stream(length):
    assert await read_all(reader_of(encode_message(Ping(1))[:length])) == ()


async def test_size_is_checked_before_the_message_is_read():
    message = encode_message(Data(b"x" * 10))
    assert await read_all(reader_of(message), len(message) - 4) == (Data(b"x" * 10),)
    reader = asyncio.StreamReader()
    reader.feed_data(message[:4])
    with pytest.raises(InvalidMessageError, match="more than"):
        await read_message(reader, DECODER, len(message) - 5)


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa4pong", b"\x91" * 900, b"\x81\xa4type\xa4ping"]
)
async def test_malformed_message_is_rejected(body):
    with pytest.raises(InvalidMessageError, match="malformed"):
        await read_message(reader_of(len(body).to_bytes(4) + body), DECODER, 1000)
