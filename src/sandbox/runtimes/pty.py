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


class PtyMaster(asyncio.ReadTransport):
    """Reads and writes one descriptor, which it takes over. What is not read is not taken from the terminal either."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        os.set_blocking(descriptor, False)
        self.output = asyncio.StreamReader(limit=_BUFFER_BYTES)
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._write_lock = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
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
        async with self._write_lock:
            while data and self._descriptor >= 0:
                try:
                    data = data[os.write(self._descriptor, data[:_CHUNK_BYTES]) :]
                except BlockingIOError:
                    await self._wait_writable()
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
        self._set_writable()
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

    async def _wait_writable(self) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(self._descriptor, self._set_writable)
        try:
            await self._writable
        finally:
            if self._descriptor >= 0:
                self._loop.remove_writer(self._descriptor)

    def _set_writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
