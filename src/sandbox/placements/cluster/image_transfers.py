"""Sends images to the hosts of workers.

The disk is read in threads, but no thread waits for a worker, because a worker may receive arbitrarily slowly.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from sandbox.interfaces.images import ImageContent, ImageReference, ImageSource
from sandbox.interfaces.worker_messages import ImagePart
from sandbox.model.errors import SandboxError
from sandbox.primitives.message_stream import encode_message

T = TypeVar("T")

_THREADS = 2
_PART_SECONDS = 60.0
_TRANSFER_SECONDS = 300.0
_BYTES_PER_SECOND = 128 * 1024
"""A transfer may take `_TRANSFER_SECONDS` plus the time that the image's files take at this rate."""


class ImageOffer:
    """The image that a worker may fetch: the one that the server has named to it last.

    Each offer allows one transfer, and only one transfer runs at a time.
    """

    def __init__(self) -> None:
        self._image: ImageReference | None = None
        self._is_taken = False

    def replace(self, image: ImageReference | None) -> None:
        """Offer another image, or none. A running transfer continues."""
        self._image = image

    @contextlib.contextmanager
    def taking(self, digest: str) -> Iterator[ImageReference | None]:
        """Yield the image for the duration of a transfer; None if the worker must not fetch this digest now."""
        if self._image is None or self._image.digest != digest or self._is_taken:
            yield None
            return
        image, self._image = self._image, None
        self._is_taken = True
        try:
            yield image
        finally:
            self._is_taken = False


class ImageTransfers:
    """Sends images. Everything runs on one event loop."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(_THREADS, "image")

    async def send(self, image: ImageReference, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send an image, and wait until the worker has closed the connection. Raises OSError, ImageUnusableError."""
        opening = self._threads.submit(self._source.open, image)
        try:
            async with asyncio.timeout(_TRANSFER_SECONDS + image.size_bytes / _BYTES_PER_SECOND):
                content = await asyncio.wrap_future(opening)
                while data := await self._run(content.read):
                    await _send_part(data, writer)
                await _send_part(b"", writer)
                async with asyncio.timeout(_PART_SECONDS):
                    await reader.read(1)
        finally:
            self._threads.submit(_close, opening)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))


async def _send_part(data: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(encode_message(ImagePart(data)))
    async with asyncio.timeout(_PART_SECONDS):
        await writer.drain()


def _close(opening: Future[ImageContent]) -> None:
    """Close an image. If the transfer was cancelled, the image may still be opened, so wait for the end of that."""
    with contextlib.suppress(OSError, SandboxError, CancelledError):
        opening.result().close()
