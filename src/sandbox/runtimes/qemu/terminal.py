"""A terminal in the guest, whose frames the channel carries."""

import asyncio

from sandbox.interfaces.runtime import ExitStatus, TerminalSize
from sandbox.runtimes.qemu.channel import Channel, GuestStream
from sandbox.runtimes.qemu.guest import frames

_CHUNK_BYTES = 4096
_REASON_CHARACTERS_MAX = 300


class QemuTerminal:
    """A terminal in the guest. Implements `Terminal`."""

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
        elif kind in (frames.READY, frames.FAILED) and not self.started.done():
            self.started.set_result(body.decode(errors="replace")[:_REASON_CHARACTERS_MAX])
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
