"""The host's end of the serial port. What comes out of it is the guest's word and nothing more."""

import asyncio
import socket
from collections.abc import Callable

from sandbox.interfaces.runtime import ExitStatus, TerminalSize
from sandbox.runtimes.qemu.guest import frames

GUEST_BACKLOG_BYTES_MAX = 4 * 1024 * 1024
ANSWERS_MAX = 4
"""A guest sends no more frames for one of the host's, output not counted: as a command starts and ends, with both of
its streams."""

UNASKED_MAX = 8
"""And so many that the host did nothing for."""

READ_COST = 20
"""A read costs the host about as much as so many frames in it."""

COST_PER_SECOND_MAX = 100_000
"""Frames that are heard in a second, each read counted as READ_COST of them. More waits in the guest."""

CONSOLE_BYTES_MAX = 64 * 1024
CONSOLE_PAUSE_SECONDS = 0.1
"""What the console says past so many bytes is read at this interval."""

_BUFFER_BYTES = 256 * 1024

FrameHandler = Callable[[bytes, int, bytes], bool]
"""Told of a frame: its kind, number and body. True for output that a stream takes, which bounds it."""


class Channel(asyncio.Protocol):
    """Frames in both directions. A guest that says no frame, or frames for nothing, is not listened to any more.

    One that says little at a time, as a byte a frame or a read, is listened to with pauses.
    """

    def __init__(self, on_frame: FrameHandler) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._on_frame = on_frame
        self._inbox = b""
        self._answers_left = UNASKED_MAX
        self._paid_until = 0.0
        self._transport: asyncio.Transport | None = None

    async def open(self, source: socket.socket) -> None:
        """Take the socket over."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=source)

    def send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        """Nothing happens once it has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._answers_left += ANSWERS_MAX
            self._transport.write(frames.pack(kind, number, body))

    def abort(self) -> None:
        """Close it at once; one that was never opened has ended then too."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
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
            self._answers_left -= not is_output
            if self._answers_left < 0:
                self.abort()
                return
            position = end
            cost += 1
        self._inbox = self._inbox[position:]
        self._pause_for(cost)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        if not self.ended.done():
            self.ended.set_result(None)

    def _pause_for(self, cost: int) -> None:
        """Unless what was heard in the last second cost little."""
        loop = asyncio.get_running_loop()
        self._paid_until = max(self._paid_until, loop.time() - 1) + cost / COST_PER_SECOND_MAX
        if self._transport is not None and self._paid_until > loop.time():
            self._transport.pause_reading()
            loop.call_at(self._paid_until, self._go_on)

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class GuestStream(asyncio.ReadTransport):
    """What a stream of the guest's looks like to its reader, who has the guest wait when it is slow."""

    def __init__(self, channel: Channel, number: int) -> None:
        super().__init__()
        self.reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
        self._channel = channel
        self._number = number
        self._has_ended = False
        self._backlog_bytes: int | None = None
        self.reader.set_transport(self)

    def feed(self, data: bytes) -> bool:
        """The guest said this; whether it was anything, and is read.

        One that goes on and on though it was told to wait is not listened to any more.
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
        """It will say no more."""
        if not self._has_ended:
            self._has_ended = True
            self.reader.feed_eof()

    def is_reading(self) -> bool:
        """asyncio's."""
        return not self._has_ended

    def pause_reading(self) -> None:
        """For the reader, whose buffer is full."""
        self._backlog_bytes = 0
        self._channel.send(frames.PAUSE, self._number)

    def resume_reading(self) -> None:
        """For the reader, which has room again."""
        self._backlog_bytes = None
        self._channel.send(frames.RESUME, self._number)

    def close(self) -> None:
        """asyncio's; the stream ends with the guest."""


class OutputTail(asyncio.Protocol):
    """The end of what a process of the host said, for telling why it failed.

    A guest can have its machine write to the console a byte at a time for ever, so that is not read as it comes.
    """

    def __init__(self) -> None:
        self.text = b""
        self._heard_bytes = 0
        self._transport: asyncio.Transport | None = None

    async def open(self, source: socket.socket) -> None:
        """Take the socket over."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=source)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self.text = (self.text + data)[-2048:]
        self._heard_bytes += len(data)
        if self._heard_bytes > CONSOLE_BYTES_MAX and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(CONSOLE_PAUSE_SECONDS, self._go_on)

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


_CHUNK_BYTES = 4096


class QemuTerminal:
    """The contract's `Terminal`."""

    def __init__(self, channel: Channel, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[str] = loop.create_future()
        self._channel = channel
        self._number = number
        self._stream = GuestStream(channel, number)
        self._write_lock = asyncio.Lock()
        self._write_ack: asyncio.Future[None] | None = None
        self._exit: asyncio.Future[ExitStatus] = loop.create_future()

    @property
    def output(self) -> asyncio.StreamReader:
        """What it shows."""
        return self._stream.reader

    async def write(self, data: bytes) -> None:
        """Type, a piece at a time: the next one when the guest says that the terminal took the last."""
        async with self._write_lock:
            for start in range(0, len(data), _CHUNK_BYTES):
                if self._stream.is_reading():
                    self._write_ack = asyncio.get_running_loop().create_future()
                    self._channel.send(frames.INPUT, self._number, data[start : start + _CHUNK_BYTES])
                    await self._write_ack

    async def resize(self, size: TerminalSize) -> None:
        """Tell it a new size."""
        self._channel.send(frames.RESIZE, self._number, frames.SIZE_BODY.pack(size.rows, size.columns))

    async def hang_up(self) -> None:
        """Have the agent close the outer end."""
        self._channel.send(frames.HANG_UP, self._number)

    async def wait(self) -> ExitStatus:
        """How the command ended."""
        return await asyncio.shield(self._exit)

    def handle_frame(self, kind: bytes, body: bytes) -> bool:
        """A frame of this terminal's; whether it was output. What makes no sense is left alone."""
        if kind == frames.DATA:
            return self._stream.feed(body)
        self._hear_answer(kind, body)
        return False

    def _hear_answer(self, kind: bytes, body: bytes) -> None:
        if kind == frames.CLOSED:
            self._stream.finish()
            self._finish_write()
        elif kind == frames.INPUT_WRITTEN:
            self._finish_write()
        elif kind in (frames.READY, frames.FAILED) and not self.started.done():
            self.started.set_result(body.decode(errors="replace"))
        elif kind == frames.EXIT and len(body) == frames.EXIT_BODY.size and not self._exit.done():
            code, was_out_of_memory = frames.EXIT_BODY.unpack(body)
            self._exit.set_result(ExitStatus(code if 0 <= code < 256 else None, was_out_of_memory))

    def finish(self, exit_: ExitStatus) -> None:
        """The guest is gone."""
        self._stream.finish()
        self._finish_write()
        if not self._exit.done():
            self._exit.set_result(exit_)

    def _finish_write(self) -> None:
        if self._write_ack is not None and not self._write_ack.done():
            self._write_ack.set_result(None)
