"""Reads request bodies within limits of memory, size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from sandbox.api.errors import PayloadTooLargeError, RequestTimeoutError
from sandbox.model import fixed_limits
from sandbox.primitives import fair_client_shares

BODY_TIMEOUT_SECONDS = 30.0
_BODY_COPIES = 2
"""Number of copies of a body in memory: while its chunks are joined, there are two."""


@asynccontextmanager
async def body_memory(request: Request, additional_bytes: int = 0) -> AsyncIterator[None]:
    """Reserve memory for the body from the client's share; wait until it is available.

    additional_bytes: size of other data that the request loads and copies in the same way as its body.
    """
    declared = request.headers.get("content-length", "")
    is_known = declared.isdecimal() and len(declared) <= 15
    size_bytes = min(int(declared), fixed_limits.BODY_BYTES_MAX) if is_known else fixed_limits.BODY_BYTES_MAX
    async with fair_client_shares.current_memory_share().reservation(_BODY_COPIES * (size_bytes + additional_bytes)):
        yield


async def read_body(request: Request) -> bytes:
    """Read the whole body.

    Raises RequestTimeoutError, or PayloadTooLargeError as soon as the size is known to exceed the limit.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > fixed_limits.BODY_BYTES_MAX):
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            return await _read_bounded(request)
    except TimeoutError:
        raise RequestTimeoutError.after(BODY_TIMEOUT_SECONDS) from None


async def _read_bounded(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > fixed_limits.BODY_BYTES_MAX:
            raise _too_large()
        body += chunk
    return bytes(body)


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body can have at most {fixed_limits.BODY_BYTES_MAX} bytes.")
