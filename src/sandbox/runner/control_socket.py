"""The runner's control socket, a Unix socket in the run directory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from sandbox.interfaces.placement import CANCEL_TOO_LATE
from sandbox.interfaces.runner import CancelAttempt, OpenTerminal, RenewLease, Reply, TerminalRefusedError
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import CancelRequested
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.runner.attempt_recorder import AttemptRecorder
from sandbox.runner.terminals import TerminalServer

_LINE_BYTES_MAX = 16 * 1024
_Request = CancelAttempt | OpenTerminal | RenewLease
_decoder: "msgspec.json.Decoder[_Request]" = msgspec.json.Decoder(_Request)

CancelHandler = Callable[[CancelAttempt], Reply]
RenewHandler = Callable[[float], None]
"""Extends the lease of the runner's gateway until a deadline."""


@contextlib.asynccontextmanager
async def serve_control_socket(
    path: Path, cancel: CancelHandler, terminals: TerminalServer, renew: RenewHandler | None = None
) -> AsyncIterator[None]:
    """Serve requests on the socket at `path` until the context exits. Its directory is private to the server's user.

    renew: None if the runner has no lease.
    """

    async def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
                request = _decode_request(await reader.readline())
                reply = _handle_request(request, cancel, terminals, renew)
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
            if isinstance(request, OpenTerminal) and reply.done:
                await terminals.serve(request, reader, writer)
        except (OSError, ValueError, TimeoutError):
            pass
        finally:
            await _close(writer)

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(handle_connection, path, limit=_LINE_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        await terminals.close_all()
        path.unlink(missing_ok=True)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close the connection, and abort it if the client does not read the rest of the output in time.

    Waiting also retrieves the error of a connection that broke. Otherwise, asyncio might log it later.
    """
    writer.close()
    try:
        async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
            await writer.wait_closed()
    except OSError:
        writer.transport.abort()


def _decode_request(line: bytes) -> _Request | Reply:
    """Return the request, or the reply to invalid input."""
    try:
        return _decoder.decode(line)
    except DECODE_ERRORS as error:
        return Reply(done=False, message=f"Invalid request: {error}")


def _handle_request(
    request: _Request | Reply, cancel: CancelHandler, terminals: TerminalServer, renew: RenewHandler | None
) -> Reply:
    if isinstance(request, Reply):
        return request
    if isinstance(request, RenewLease):
        if renew is None:
            return Reply(done=False, message="This runner has no lease.")
        renew(request.deadline)
        return Reply(done=True)
    if isinstance(request, CancelAttempt):
        try:
            return cancel(request)
        except OSError as error:
            return Reply(done=False, message=str(error), was_disk_write_rejected=True)
    try:
        terminals.check_can_open(request)
    except TerminalRefusedError as error:
        return Reply(done=False, message=error.message)
    return Reply(done=True)


def record_cancel(recorder: AttemptRecorder, request: CancelAttempt) -> Reply:
    """Record a cancel request, which is durable when the reply is returned. Raises OSError."""
    task = recorder.task
    if task.state.is_final:
        return Reply(done=False, message=f"Task {task.id} is already {task.state}.")
    recorder.record(CancelRequested(request.reason, request.force))
    if recorder.task.cancel is None:
        return Reply(done=True, message=CANCEL_TOO_LATE)
    return Reply(done=True)
