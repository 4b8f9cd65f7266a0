"""The runner's end of a sandbox's output."""

import asyncio
import socket

_BUFFER_BYTES = 256 * 1024


class _ClosingProtocol(asyncio.StreamReaderProtocol):
    """Closes its transport at the end of the stream instead of keeping the other direction open."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def read_from(source: socket.socket) -> tuple[asyncio.StreamReader, asyncio.Transport]:
    """A reader of raw chunks, and the transport to abort it by. Takes the socket over."""
    source.shutdown(socket.SHUT_WR)
    reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: _ClosingProtocol(reader), sock=source)
    return reader, transport
