"""One TCP connection of the gateway's."""

import asyncio
from contextlib import suppress
from socket import IPPROTO_TCP, SO_RCVBUF, SO_SNDBUF, SOL_SOCKET, TCP_NOTSENT_LOWAT, socket

from sandbox.gateway.limits import (
    NARROW_BUFFER_BYTES,
    UNSENT_BYTES_MAX,
    UPSTREAM_RECEIVE_BYTES_MAX,
    WIDE_CONNECTIONS_MAX,
)

READ_BYTES = 16 * 1024
"""So little that what is in it, a thousand chunks of a byte each for example, is soon judged."""

FIRST_READ_BYTES = 4 * 1024
"""For a model connection without a forwarded request, so that an expensive one delays the others less."""

RELAY_BYTES = 256 * 1024
"""For data that is relayed unread; as much as asyncio reads at once."""

_READ_AHEAD_BYTES = 1
"""Nothing is read ahead, so that the kernel joins small pieces and a waiting connection costs nothing."""

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h


class Stream:
    """One TCP connection, cut when it is not renewed in time. Its peer going away is an end, never an error."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        self.has_timed_out = False

    @classmethod
    async def from_socket(cls, accepted: socket) -> "Stream":
        """A connection from inside."""
        with suppress(OSError):  # it has gone already
            accepted.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        return cls(*await asyncio.open_connection(sock=accepted, limit=_READ_AHEAD_BYTES))

    @classmethod
    async def connect(cls, address: str, port: int) -> "Stream":
        """Raises OSError."""
        reader, writer = await asyncio.open_connection(address, port, limit=_READ_AHEAD_BYTES)
        limit_buffers(writer.get_extra_info("socket"))
        return cls(reader, writer)

    def narrow(self) -> None:
        """Leave less room in the kernel for what it sends and receives."""
        with suppress(OSError):  # it has gone already
            for buffer in (SO_RCVBUF, SO_SNDBUF):
                self._writer.get_extra_info("socket").setsockopt(SOL_SOCKET, buffer, NARROW_BUFFER_BYTES)

    async def read(self, bytes_max: int = READ_BYTES) -> bytes:
        """The next bytes, none at the end."""
        try:
            return await self._reader.read(bytes_max)
        except OSError:
            return b""

    @property
    def is_closing(self) -> bool:
        """Whether nothing that is written would arrive."""
        return self._writer.is_closing()

    def write(self, data: bytes | bytearray) -> None:
        if data and not self._writer.is_closing():
            self._writer.write(bytes(data))

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        with suppress(OSError):
            await self._writer.drain()

    def write_eof(self) -> None:
        """Nothing more is written after what was."""
        with suppress(OSError):
            self._writer.write_eof()

    def set_timeout(self, seconds: float) -> None:
        """Cut the line after so long from now."""
        self.clear_timeout()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._abort_on_timeout)

    def clear_timeout(self) -> None:
        """Do not cut it before it is renewed: nobody listens to it meanwhile."""
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """End it at once, whatever was not yet sent."""
        self.clear_timeout()
        self._writer.transport.abort()

    def _abort_on_timeout(self) -> None:
        self.has_timed_out = True
        self._writer.transport.abort()


def limit_buffers(connection: socket) -> None:
    """Bound what the kernel buffers for a stalled connection; no task is charged for it.

    Only root may ask for such a buffer where the machine's rmem_max is smaller; others keep the machine's sizes.
    """
    with suppress(PermissionError):
        connection.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, UPSTREAM_RECEIVE_BYTES_MAX)
    connection.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)


class WideConnections:
    """Those of a gateway to hosts, to the model or from inside. A further one gets small buffers for good."""

    def __init__(self) -> None:
        self._wide: list[Stream] = []

    def add(self, line: Stream) -> None:
        """A new connection."""
        self._wide = [one for one in self._wide if not one.is_closing]
        if len(self._wide) < WIDE_CONNECTIONS_MAX:
            self._wide.append(line)
        else:
            line.narrow()
