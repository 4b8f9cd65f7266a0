"""Speaks to a runner on its control socket."""

import asyncio
import errno
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.layout import runner_socket
from sandbox.interfaces.placement import CancelOrder, Receipt, RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.terminals import (
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


_BLAMES_NO_RUNNER = frozenset(
    {errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ENOTDIR, errno.ELOOP}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
)
"""Nobody listens, somebody else has taken the place, or this process has nothing to ask with. Everything else (a
connection past the runner's backlog is reset, though it seemed to be made) comes from somebody who listens and does not
take what comes."""


class UnixRunnerControl:
    """Speaks to runners of this machine."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    async def answers(self, attempt_id: str) -> bool:
        """See `RunnerControl.answers`. A runner has a receipt for everything, also for what is no order."""
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                await _exchange(runner_socket(self._run_dir, attempt_id), b"{}")
        except OSError as error:
            return error.errno in _BLAMES_NO_RUNNER
        return True

    async def cancel(self, attempt_id: str, order: CancelOrder) -> Receipt:
        """See `RunnerControl.cancel`."""
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                answer = await _exchange(runner_socket(self._run_dir, attempt_id), msgspec.json.encode(order))
            return msgspec.json.decode(answer, type=Receipt)
        except (OSError, TimeoutError, ValueError) as error:
            raise RunnerUnreachableError(f"The runner of attempt {attempt_id} does not answer.") from error

    async def open_terminal(self, attempt_id: str, order: TerminalOrder) -> UnixTerminalLine:
        """See `RunnerControl.open_terminal`."""
        return await open_line(runner_socket(self._run_dir, attempt_id), order)


async def _exchange(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
