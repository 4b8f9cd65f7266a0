"""Client of a runner's control socket, over any stream that leads to it."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from sandbox.interfaces.runner import (
    FRAME_BYTES_MAX,
    CancelAttempt,
    ClientFrame,
    EndFrame,
    OpenTerminal,
    RenewLease,
    Reply,
    RunnerFrame,
    RunnerUnreachableError,
    TerminalRefusedError,
)
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.primitives.message_stream import StreamPair, encode_message, read_message

_decoder: "msgspec.msgpack.Decoder[RunnerFrame]" = msgspec.msgpack.Decoder(RunnerFrame)


class StreamTerminalConnection:
    """Implements `interfaces.runner.TerminalConnection`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> RunnerFrame:
        """Read a frame; an EndFrame if the runner hung up. Implements `TerminalConnection.read`."""
        try:
            frame = await read_message(self._reader, _decoder, FRAME_BYTES_MAX)
        except (OSError, ValueError):
            frame = None
        return frame or EndFrame(message="The task's runner closed the connection; check the task's status.")

    async def send(self, frame: ClientFrame) -> None:
        """Send a frame; do nothing if the runner hung up. Implements `TerminalConnection.send`."""
        with suppress(OSError):
            self._writer.write(encode_message(frame))
            await self._writer.drain()

    async def close(self) -> None:
        """Close the connection. Implements `TerminalConnection.close`."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


Connect = Callable[[], Awaitable[StreamPair]]
"""Opens a stream to a runner's control socket; its reader has a limit of FRAME_BYTES_MAX. Raises OSError."""


async def _open_terminal(connect: Connect, request: OpenTerminal) -> StreamTerminalConnection:
    """Connect to a runner and open a terminal. Raises RunnerUnreachableError, TerminalRefusedError."""
    try:
        async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
            reader, writer = await connect()
            try:
                return await _request_terminal(reader, writer, request)
            except BaseException:
                writer.close()
                raise
    except (OSError, TimeoutError, ValueError) as error:
        raise RunnerUnreachableError("The task's runner is not responding.") from error


async def _request_terminal(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: OpenTerminal
) -> StreamTerminalConnection:
    writer.write(msgspec.json.encode(request) + b"\n")
    reply = msgspec.json.decode(await reader.readline(), type=Reply)
    if not reply.done:
        raise TerminalRefusedError(reply.message)
    return StreamTerminalConnection(reader, writer)


_INCONCLUSIVE_ERRNOS = frozenset(
    {errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ENOTDIR, errno.ELOOP}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
)
"""Errors that do not prove that a runner is unresponsive.

They mean that no process listens, the path does not lead to a socket, or this process lacks resources. All other errors
come from a runner that listens but does not accept connections: for example, a connection beyond the runner's backlog
is reset although it seemed to be established.
"""


class RunnerClient:
    """Client of a runner's control socket, which might not exist."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def may_be_responsive(self) -> bool:
        """Return whether the runner responds; see `RunnerHandle.may_be_responsive`.

        A runner replies to every message, even to an invalid one.
        """
        try:
            async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
                await _exchange(self._connect, b"{}")
        except OSError as error:
            return error.errno in _INCONCLUSIVE_ERRNOS
        return True

    async def cancel(self, request: CancelAttempt) -> Reply:
        """Request cancellation; see `RunnerHandle.cancel`."""
        return await self._request(request)

    async def _request(self, request: CancelAttempt | RenewLease) -> Reply:
        try:
            async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
                response = await _exchange(self._connect, msgspec.json.encode(request))
            return msgspec.json.decode(response, type=Reply)
        except (OSError, TimeoutError, ValueError) as error:
            raise RunnerUnreachableError("The task's runner is not responding.") from error

    async def renew_lease(self, request: RenewLease) -> Reply:
        """Extend the lease of the runner's gateway. Raises RunnerUnreachableError, after 5 s at the latest."""
        return await self._request(request)

    async def open_terminal(self, request: OpenTerminal) -> StreamTerminalConnection:
        """Open a terminal; see `RunnerHandle.open_terminal`."""
        return await _open_terminal(self._connect, request)


class LocalRunnerClient(RunnerClient):
    """Client of a control socket on this host."""

    def __init__(self, path: Path) -> None:
        super().__init__(partial(asyncio.open_unix_connection, path, limit=FRAME_BYTES_MAX))


async def _exchange(connect: Connect, line: bytes) -> bytes:
    reader, writer = await connect()
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
