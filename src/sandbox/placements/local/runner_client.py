"""Client of a runner's control socket."""

import asyncio
import errno
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.file_layout import runner_socket
from sandbox.interfaces.placement import CancelOrder, Reply, RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.terminals import (
    FRAME_BYTES_MAX,
    ClientFrame,
    EndFrame,
    RunnerFrame,
    TerminalRefusedError,
    encode_frame,
    read_frame,
)
from sandbox.model.limits import CONTROL_SECONDS

_decoder: "msgspec.msgpack.Decoder[RunnerFrame]" = msgspec.msgpack.Decoder(RunnerFrame)


class UnixTerminalConnection:
    """Implements `interfaces.terminals.TerminalConnection`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> RunnerFrame:
        """Read a frame; an EndFrame if the runner hung up. Implements `TerminalConnection.read`."""
        try:
            frame = await read_frame(self._reader, _decoder)
        except (OSError, ValueError):
            frame = None
        return frame or EndFrame(message="The task's runner closed the connection; check the task's status.")

    async def send(self, frame: ClientFrame) -> None:
        """Send a frame; ignored if the runner hung up. Implements `TerminalConnection.send`."""
        with suppress(OSError):
            self._writer.write(encode_frame(frame))
            await self._writer.drain()

    async def close(self) -> None:
        """Close the connection. Implements `TerminalConnection.close`."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def open_terminal_connection(path: Path, order: TerminalOrder) -> UnixTerminalConnection:
    """Connect to a runner and open a terminal. Raises RunnerUnreachableError, TerminalRefusedError."""
    try:
        async with asyncio.timeout(CONTROL_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=FRAME_BYTES_MAX)
            try:
                return await _request_terminal(reader, writer, order)
            except BaseException:
                writer.close()
                raise
    except (OSError, TimeoutError, ValueError) as error:
        raise RunnerUnreachableError("The task's runner does not respond.") from error


async def _request_terminal(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, order: TerminalOrder
) -> UnixTerminalConnection:
    writer.write(msgspec.json.encode(order) + b"\n")
    reply = msgspec.json.decode(await reader.readline(), type=Reply)
    if not reply.done:
        raise TerminalRefusedError(reply.message)
    return UnixTerminalConnection(reader, writer)


_INCONCLUSIVE_ERRNOS = frozenset(
    {errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ENOTDIR, errno.ELOOP}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
)
"""Errors that do not prove that a runner is unresponsive.

No process listens, the path is another file, or this process lacks resources. All other errors come from a runner that
listens but does not accept: for example, a connection beyond its backlog is reset although it seemed established.
"""


class UnixRunnerClient:
    """Sends orders to runners on this machine. Implements `interfaces.placement.RunnerClient`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    async def is_responsive(self, attempt_id: str) -> bool:
        """Return whether the runner responds. Implements `RunnerClient.is_responsive`.

        A runner replies to every message, even to one that is not an order.
        """
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                await _exchange(runner_socket(self._run_dir, attempt_id), b"{}")
        except OSError as error:
            return error.errno in _INCONCLUSIVE_ERRNOS
        return True

    async def cancel(self, attempt_id: str, order: CancelOrder) -> Reply:
        """Request cancellation. Implements `RunnerClient.cancel`."""
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                response = await _exchange(runner_socket(self._run_dir, attempt_id), msgspec.json.encode(order))
            return msgspec.json.decode(response, type=Reply)
        except (OSError, TimeoutError, ValueError) as error:
            raise RunnerUnreachableError(f"The runner of attempt {attempt_id} does not respond.") from error

    async def open_terminal(self, attempt_id: str, order: TerminalOrder) -> UnixTerminalConnection:
        """Open a terminal. Implements `RunnerClient.open_terminal`."""
        return await open_terminal_connection(runner_socket(self._run_dir, attempt_id), order)


async def _exchange(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
