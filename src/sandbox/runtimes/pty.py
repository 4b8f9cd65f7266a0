"""The outer end of a pseudo-terminal, whoever holds the inner one."""

import asyncio
import fcntl
import os
import struct
import termios
from contextlib import suppress

from sandbox.interfaces.runtime import TerminalSize

_CHUNK_BYTES = 64 * 1024
_BUFFER_BYTES = 256 * 1024


class TerminalEnd(asyncio.ReadTransport):
    """Reads and writes one descriptor, which it takes over. What is not read is not taken from the terminal either."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        os.set_blocking(descriptor, False)
        self.output = asyncio.StreamReader(limit=_BUFFER_BYTES)
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._writing = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None
        self.output.set_transport(self)
        self.resume_reading()

    def is_reading(self) -> bool:
        """Whether it is open; a pause is not counted."""
        return self._descriptor >= 0

    def pause_reading(self) -> None:
        """For the reader, whose buffer is full."""
        self._loop.remove_reader(self._descriptor)

    def resume_reading(self) -> None:
        """For the reader, which has room again."""
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._read)

    async def write(self, data: bytes) -> None:
        """Write it all, however long nobody reads. Nothing happens on a closed end."""
        async with self._writing:
            while data and self._descriptor >= 0:
                try:
                    data = data[os.write(self._descriptor, data[:_CHUNK_BYTES]) :]
                except BlockingIOError:
                    await self._wait_for_room()
                except OSError:
                    return

    def resize(self, size: TerminalSize) -> None:
        """Tell the terminal, which tells its foreground processes."""
        if self._descriptor >= 0:
            with suppress(OSError):
                fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))

    def close(self) -> None:
        """Close it; whoever holds the inner end is hung up. Again is fine."""
        if self._descriptor < 0:
            return
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._give_room()
        os.close(self._descriptor)
        self._descriptor = -1
        self.output.feed_eof()

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody holds the inner end any more
            chunk = b""
        if chunk:
            self.output.feed_data(chunk)
        else:
            self.close()

    async def _wait_for_room(self) -> None:
        self._room = self._loop.create_future()
        self._loop.add_writer(self._descriptor, self._give_room)
        try:
            await self._room
        finally:
            if self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)

    def _give_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
