"""The master side of a pty."""

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
    """Reads and writes a descriptor, of which it takes ownership.

    Output that the reader does not consume stays in the terminal's buffer.
    """

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
        """Return whether the descriptor is open, even while reading is paused."""
        return self._descriptor >= 0

    def pause_reading(self) -> None:
        """Stop reading; called by the StreamReader when its buffer is full."""
        self._loop.remove_reader(self._descriptor)

    def resume_reading(self) -> None:
        """Resume reading; called by the StreamReader when its buffer has space."""
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._read)

    async def write(self, data: bytes) -> None:
        """Write all data; wait while no program reads it. Does nothing if the master is closed."""
        async with self._write_lock:
            while data and self._descriptor >= 0:
                try:
                    data = data[os.write(self._descriptor, data[:_CHUNK_BYTES]) :]
                except BlockingIOError:
                    await self._wait_writable()
                except OSError:
                    return

    def resize(self, size: TerminalSize) -> None:
        """Set the size of the terminal, which signals its foreground processes."""
        if self._descriptor >= 0:
            with suppress(OSError):
                fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))

    def close(self) -> None:
        """Close the master, which hangs up processes on the slave side. Idempotent."""
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
        except OSError:  # EIO: no process has the slave open
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
