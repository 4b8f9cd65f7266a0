"""The host's end of the guest's serial port, which carries commands, their output and terminals.

All received data is untrusted.
"""

import asyncio
import socket
from collections.abc import Callable

from sandbox.interfaces.runtime import ExitStatus, TerminalSize
from sandbox.runtimes.qemu.guest import frames

GUEST_BACKLOG_BYTES_MAX = 4 * 1024 * 1024
REPLIES_MAX = 4
"""Maximum number of frames without output that a guest may send for each frame from the host.

The guest needs this many when a command starts and ends and both of its streams end.
"""

UNSOLICITED_FRAMES_MAX = 8
"""Maximum number of additional frames that a guest may send without a frame from the host."""

READ_COST = 20
"""Cost of a read, in frames."""

COST_PER_SECOND_MAX = 100_000
"""Maximum number of frames handled per second; each read counts as READ_COST frames. The rest waits in the guest."""


_BUFFER_BYTES = 256 * 1024

FrameHandler = Callable[[bytes, int, bytes], bool]
"""Called with a frame's kind, number and body. Returns True for output that a stream accepts and limits."""


class Channel(asyncio.Protocol):
    """Sends and receives frames. Aborts on an invalid frame and on too many unsolicited frames.

    Reading is paused if the guest sends small pieces at a high rate, for example one byte per frame or per read.
    """

    def __init__(self, on_frame: FrameHandler) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._on_frame = on_frame
        self._inbox = b""
        self._replies_left = UNSOLICITED_FRAMES_MAX
        self._throttled_until = 0.0
        self._transport: asyncio.Transport | None = None

    async def open(self, source: socket.socket) -> None:
        """Read from a connected socket, and take ownership of it."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=source)

    def send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        """Send a frame. Does nothing after the channel has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._replies_left += REPLIES_MAX
            self._transport.write(frames.pack(kind, number, body))

    def abort(self) -> None:
        """Close the channel immediately. This also ends a channel that was never opened."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse the received data into frames and handle them."""
        self._inbox += data
        position, cost = 0, READ_COST
        while len(self._inbox) - position >= frames.HEADER.size:
            kind, number, length = frames.HEADER.unpack_from(self._inbox, position)
            if length > frames.GUEST_FRAME_BYTES_MAX:
                self.abort()
                return
            end = position + frames.HEADER.size + length
            if len(self._inbox) < end:
                break
            is_output = self._on_frame(kind, number[0], self._inbox[position + frames.HEADER.size : end])
            self._replies_left -= not is_output
            if self._replies_left < 0:
                self.abort()
                return
            position = end
            cost += 1
        self._inbox = self._inbox[position:]
        self._pause_for(cost)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _pause_for(self, cost: int) -> None:
        """Pause reading if the data of the last second exceeded the allowed cost."""
        loop = asyncio.get_running_loop()
        self._throttled_until = max(self._throttled_until, loop.time() - 1) + cost / COST_PER_SECOND_MAX
        if self._transport is not None and self._throttled_until > loop.time():
            self._transport.pause_reading()
            loop.call_at(self._throttled_until, self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class GuestStream(asyncio.ReadTransport):
    """Transport of one of the guest's streams. Pauses the guest while the reader's buffer is full."""

    def __init__(self, channel: Channel, number: int) -> None:
        super().__init__()
        self.reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
        self._channel = channel
        self._number = number
        self._has_ended = False
        self._backlog_bytes: int | None = None
        self.reader.set_transport(self)

    def feed(self, data: bytes) -> bool:
        """Add data from the guest. Returns whether the stream accepted any data.

        Aborts the channel if the guest keeps sending after a PAUSE frame.
        """
        if self._backlog_bytes is not None:
            self._backlog_bytes += len(data)
            if self._backlog_bytes > GUEST_BACKLOG_BYTES_MAX:
                self._channel.abort()
                return False
        if self._has_ended:
            return False
        self.reader.feed_data(data)
        return bool(data)

    def finish(self) -> None:
        """End the stream: the guest sends no more data."""
        if not self._has_ended:
            self._has_ended = True
            self.reader.feed_eof()

    def is_reading(self) -> bool:
        """Return whether the stream has not ended."""
        return not self._has_ended

    def pause_reading(self) -> None:
        """Send a PAUSE frame; called by the StreamReader when its buffer is full."""
        self._backlog_bytes = 0
        self._send(frames.PAUSE)

    def resume_reading(self) -> None:
        """Send a RESUME frame; called by the StreamReader when its buffer has space."""
        self._backlog_bytes = None
        self._send(frames.RESUME)

    def close(self) -> None:
        """Do nothing, because the stream is closed when the guest exits."""

    def _send(self, kind: bytes) -> None:
        if not self._has_ended:  # otherwise, another terminal may use the number
            self._channel.send(kind, self._number)


_CHUNK_BYTES = 4096
_REASON_CHARACTERS_MAX = 300


class QemuTerminal:
    """A terminal in the guest. Implements `Terminal`."""

    def __init__(self, channel: Channel, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.start_result: asyncio.Future[str] = loop.create_future()
        self._channel = channel
        self._number = number
        self._stream = GuestStream(channel, number)
        self._write_lock = asyncio.Lock()
        self._write_ack: asyncio.Future[None] | None = None
        self._exit: asyncio.Future[ExitStatus] = loop.create_future()

    @property
    def output(self) -> asyncio.StreamReader:
        """The terminal's output."""
        return self._stream.reader

    @property
    def has_ended(self) -> bool:
        """Whether the command has exited and its output has ended. No further frames with this number follow."""
        return self._exit.done() and not self._stream.is_reading()

    async def write(self, data: bytes) -> None:
        """Write in chunks. After each chunk, wait until the guest acknowledges that the terminal accepted it."""
        async with self._write_lock:
            for start in range(0, len(data), _CHUNK_BYTES):
                if self._stream.is_reading():
                    self._write_ack = asyncio.get_running_loop().create_future()
                    self._channel.send(frames.INPUT, self._number, data[start : start + _CHUNK_BYTES])
                    await self._write_ack

    async def resize(self, size: TerminalSize) -> None:
        """Change the terminal's size."""
        if self._stream.is_reading():
            self._channel.send(frames.RESIZE, self._number, frames.SIZE_BODY.pack(size.rows, size.columns))

    async def hang_up(self) -> None:
        """Make the guest agent close the pty's master."""
        if self._stream.is_reading():
            self._channel.send(frames.HANG_UP, self._number)

    async def wait(self) -> ExitStatus:
        """Return the command's exit status."""
        return await asyncio.shield(self._exit)

    def handle_frame(self, kind: bytes, body: bytes) -> bool:
        """Handle a frame for this terminal. Returns whether the frame was output. Invalid frames are ignored."""
        if kind == frames.DATA:
            return self._stream.feed(body)
        self._handle_reply(kind, body)
        return False

    def _handle_reply(self, kind: bytes, body: bytes) -> None:
        if kind == frames.CLOSED:
            self._stream.finish()
            self._finish_write()
        elif kind == frames.INPUT_WRITTEN:
            self._finish_write()
        elif kind in (frames.READY, frames.FAILED) and not self.start_result.done():
            self.start_result.set_result(body.decode(errors="replace")[:_REASON_CHARACTERS_MAX])
        elif kind == frames.EXIT and len(body) == frames.EXIT_BODY.size and not self._exit.done():
            code, was_oom_killed = frames.EXIT_BODY.unpack(body)
            self._exit.set_result(ExitStatus(code if 0 <= code < 256 else None, was_oom_killed))

    def finish(self, exit_status: ExitStatus) -> None:
        """End the terminal, because the guest has ended."""
        self._stream.finish()
        self._finish_write()
        if not self._exit.done():
            self._exit.set_result(exit_status)

    def _finish_write(self) -> None:
        if self._write_ack is not None and not self._write_ack.done():
            self._write_ack.set_result(None)
