"""One TCP connection of the gateway's."""

import asyncio
from contextlib import suppress
from socket import socket

READ_BYTES = 16 * 1024
"""So little that what is in it, a thousand chunks of a byte each for example, is soon judged."""

FIRST_READ_BYTES = 4 * 1024
"""Of a connection to the model that may be anybody's, so that those that cost much keep the others waiting less."""

RELAY_BYTES = 256 * 1024
"""Of what is passed on as it is; as much as asyncio reads at once."""

_READ_AHEAD_BYTES = 1
"""Nothing is read before it is asked for, so that the kernel joins small pieces and a waiting line costs nothing."""


class Line:
    """One TCP connection, cut when it is not renewed in time. Its peer going away is an end, never an error."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        self.has_timed_out = False

    @classmethod
    async def over(cls, accepted: socket) -> "Line":
        return cls(*await asyncio.open_connection(sock=accepted, limit=_READ_AHEAD_BYTES))

    @classmethod
    async def to(cls, address: str, port: int) -> "Line":
        """Raises OSError."""
        return cls(*await asyncio.open_connection(address, port, limit=_READ_AHEAD_BYTES))

    async def read(self, bytes_max: int = READ_BYTES) -> bytes:
        """The next bytes, none at the end."""
        try:
            return await self._reader.read(bytes_max)
        except OSError:
            return b""

    @property
    def is_gone(self) -> bool:
        """Whether nothing that is written would arrive."""
        return self._writer.is_closing()

    def write(self, data: bytes | bytearray) -> None:
        if data and not self._writer.is_closing():
            self._writer.write(bytes(data))

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        with suppress(OSError):
            await self._writer.drain()

    def end(self) -> None:
        """Nothing more is written after what was."""
        with suppress(OSError):
            self._writer.write_eof()

    def renew(self, seconds: float) -> None:
        """Cut the line after so long from now."""
        self.pause()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out)

    def pause(self) -> None:
        """Do not cut it before it is renewed: nobody listens to it meanwhile."""
        if self._timer is not None:
            self._timer.cancel()

    def cut(self) -> None:
        """End it at once, whatever was not yet sent."""
        self.pause()
        self._writer.transport.abort()

    def _time_out(self) -> None:
        self.has_timed_out = True
        self._writer.transport.abort()
