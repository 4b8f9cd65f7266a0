"""A client of a terminal gets the runner's frames, and an end frame once the runner hangs up or sends anything else."""

import asyncio

import pytest

from sandbox.interfaces.runner import FRAME_BYTES_MAX, EndFrame, OutputFrame
from sandbox.placements.runner_client import StreamTerminalConnection
from sandbox.primitives.message_stream import encode_message


async def read_frames(received: bytes, count: int) -> list:
    reader = asyncio.StreamReader()
    reader.feed_data(received)
    reader.feed_eof()
    connection = StreamTerminalConnection(reader, None)
    return [await connection.read() for _ in range(count)]


async def test_frames_are_returned_in_order():
    frames = [OutputFrame(b"one"), OutputFrame(b"x" * (FRAME_BYTES_MAX - 100)), EndFrame(3)]
    assert await read_frames(b"".join(map(encode_message, frames)), 3) == frames


@pytest.mark.parametrize(
    "received",
    [b"", b"\0\0", b"\0\0\0\x05ab", (FRAME_BYTES_MAX + 1).to_bytes(4), b"\0\0\0\x01\xc1", b"\0\0\0\x01\x07"],
    ids=["nothing", "partial length", "partial frame", "too large", "not MessagePack", "no frame"],
)
async def test_missing_or_invalid_frame_ends_the_connection_with_a_message(received):
    [frame] = await read_frames(received, 1)
    assert isinstance(frame, EndFrame)
    assert "closed the connection" in frame.message
