"""A further command in the guest, on a terminal that the agent made there."""

import asyncio

from sandbox.contracts.runtime import Exit, TerminalSize
from sandbox.runtimes.qemu.channel import Channel, Stream
from sandbox.runtimes.qemu.guest import frames

_CHUNK_BYTES = 4096


class QemuTerminal:
    """The contract's `Terminal`."""

    def __init__(self, channel: Channel, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[str] = loop.create_future()
        self._channel = channel
        self._number = number
        self._stream = Stream(channel, number)
        self._typing = asyncio.Lock()
        self._typed: asyncio.Future[None] | None = None
        self._exit: asyncio.Future[Exit] = loop.create_future()

    @property
    def output(self) -> asyncio.StreamReader:
        """What it shows."""
        return self._stream.reader

    async def write(self, data: bytes) -> None:
        """Type, a piece at a time: the next one when the guest says that the terminal took the last."""
        async with self._typing:
            for start in range(0, len(data), _CHUNK_BYTES):
                if self._stream.is_reading():
                    self._typed = asyncio.get_running_loop().create_future()
                    self._channel.send(frames.TYPE, self._number, data[start : start + _CHUNK_BYTES])
                    await self._typed

    async def resize(self, size: TerminalSize) -> None:
        """Tell it a new size."""
        self._channel.send(frames.RESIZE, self._number, frames.SIZE_BODY.pack(size.rows, size.columns))

    async def hang_up(self) -> None:
        """Have the agent close the outer end."""
        self._channel.send(frames.HANG_UP, self._number)

    async def wait(self) -> Exit:
        """How the command ended."""
        return await asyncio.shield(self._exit)

    def hear(self, kind: bytes, body: bytes) -> bool:
        """A frame of this terminal's; whether it was output. What makes no sense is left alone."""
        if kind == frames.SAID:
            return self._stream.hear(body)
        self._hear_answer(kind, body)
        return False

    def _hear_answer(self, kind: bytes, body: bytes) -> None:
        if kind == frames.CLOSED:
            self._stream.end()
            self._end_typing()
        elif kind == frames.TYPED:
            self._end_typing()
        elif kind in (frames.READY, frames.FAILED) and not self.started.done():
            self.started.set_result(body.decode(errors="replace"))
        elif kind == frames.EXIT and len(body) == frames.EXIT_BODY.size and not self._exit.done():
            code, was_out_of_memory = frames.EXIT_BODY.unpack(body)
            self._exit.set_result(Exit(code if 0 <= code < 256 else None, was_out_of_memory))

    def end(self, how: Exit) -> None:
        """The guest is gone."""
        self._stream.end()
        self._end_typing()
        if not self._exit.done():
            self._exit.set_result(how)

    def _end_typing(self) -> None:
        if self._typed is not None and not self._typed.done():
            self._typed.set_result(None)
