"""The runner's ear: one small Unix socket beside the journal."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from sandbox.contracts.placement import CancelOrder, Receipt
from sandbox.model.limits import CONTROL_SECONDS

_LINE_BYTES_MAX = 16 * 1024
_decoder = msgspec.json.Decoder(CancelOrder)


@contextlib.asynccontextmanager
async def listening(path: Path, cancel: Callable[[CancelOrder], Receipt]) -> AsyncIterator[None]:
    """Answer orders at `path` while the context lasts. The directory is private to the server's user."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                receipt = _obey(await reader.readline(), cancel)
                writer.write(msgspec.json.encode(receipt) + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass
        finally:
            writer.close()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(answer, path, limit=_LINE_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _obey(line: bytes, cancel: Callable[[CancelOrder], Receipt]) -> Receipt:
    try:
        order = _decoder.decode(line)
    except msgspec.DecodeError as error:
        return Receipt(done=False, message=f"Not an order: {error}")
    return cancel(order)
