"""A client's line to a terminal, over its runner's control socket."""

import asyncio
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.contracts.placement import Receipt, RunnerUnreachableError, TerminalOrder
from sandbox.contracts.terminals import (
    FRAME_BYTES_MAX,
    Ended,
    FromClient,
    FromRunner,
    TerminalRefusedError,
    pack,
    read_frame,
)
from sandbox.model.limits import CONTROL_SECONDS

_decoder: "msgspec.msgpack.Decoder[FromRunner]" = msgspec.msgpack.Decoder(FromRunner)


class UnixTerminalLine:
    """The contract's `TerminalLine`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> FromRunner:
        """See `TerminalLine.read`."""
        try:
            frame = await read_frame(self._reader, _decoder)
        except (OSError, ValueError):
            frame = None
        return frame or Ended(message="The task's runner hung up; look at the task's status.")

    async def send(self, wished: FromClient) -> None:
        """See `TerminalLine.send`."""
        with suppress(OSError):
            self._writer.write(pack(wished))
            await self._writer.drain()

    async def close(self) -> None:
        """See `TerminalLine.close`."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def open_line(path: Path, order: TerminalOrder) -> UnixTerminalLine:
    """Raises RunnerUnreachableError, TerminalRefusedError."""
    try:
        async with asyncio.timeout(CONTROL_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=FRAME_BYTES_MAX)
            try:
                return await _ask(reader, writer, order)
            except BaseException:
                writer.close()
                raise
    except (OSError, TimeoutError, ValueError) as error:
        raise RunnerUnreachableError("The task's runner does not answer.") from error


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: TerminalOrder) -> UnixTerminalLine:
    writer.write(msgspec.json.encode(order) + b"\n")
    receipt = msgspec.json.decode(await reader.readline(), type=Receipt)
    if not receipt.done:
        raise TerminalRefusedError(receipt.message)
    return UnixTerminalLine(reader, writer)
