"""Sends images to the hosts of workers.

The disk is read in threads, but no thread waits for a worker, because a worker may receive arbitrarily slowly.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from sandbox.interfaces.images import (
    ImageContent,
    ImageReference,
    ImageSource,
    ImageTransfersBusyError,
    ImageUnreadableError,
    ImageUnusableError,
)
from sandbox.interfaces.worker_messages import ImageNotSent, ImagePart
from sandbox.model.errors import SandboxError, error_reason
from sandbox.primitives.message_stream import encode_message

T = TypeVar("T")
_log = logging.getLogger(__name__)

TRANSFERS_MAX = 64
"""Maximum number of images that are sent at once, to all workers. Each transfer needs less than 2 MiB of memory."""

_THREADS = 2
_PART_TIMEOUT_SECONDS = 60.0
_TRANSFER_SECONDS = 300.0
_BYTES_PER_SECOND = 128 * 1024
"""A transfer may take `_TRANSFER_SECONDS` plus the time that the image's files take at this rate."""


class ImageOffer:
    """The image that a worker may fetch: the last one that the server named in a request to this worker.

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
        self._running_count = 0

    async def send(self, image: ImageReference, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send an image, or the reason why not; then wait until the worker closes the connection. Raises OSError."""
        try:
            with self._counted():
                await self._send_content(image, writer)
                await _wait_for_close(reader)
        except (ImageTransfersBusyError, ImageUnreadableError) as error:
            await _send(ImageNotSent(error.code, error.message), writer)
            await _wait_for_close(reader)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a transfer for the duration of the block. Raises ImageTransfersBusyError."""
        if self._running_count >= TRANSFERS_MAX:
            message = f"The server is sending {TRANSFERS_MAX} images, the maximum; the worker asks again later."
            raise ImageTransfersBusyError(message)
        self._running_count += 1
        try:
            yield
        finally:
            self._running_count -= 1

    async def _send_content(self, image: ImageReference, writer: asyncio.StreamWriter) -> None:
        """Send all parts of an image. Raises OSError, ImageUnreadableError."""
        opening = self._threads.submit(self._source.open, image)
        try:
            async with asyncio.timeout(_TRANSFER_SECONDS + image.size_bytes / _BYTES_PER_SECOND):
                content = await _reading(image, opening)
                while data := await _reading(image, self._threads.submit(content.read)):
                    await _send(ImagePart(data), writer)
                await _send(ImagePart(b""), writer)
        finally:
            self._threads.submit(_close, opening)


async def _reading(image: ImageReference, reading: Future[T]) -> T:
    """Return what a thread has read. Log the error if the image cannot be read. Raises ImageUnreadableError."""
    try:
        return await asyncio.wrap_future(reading)
    except (OSError, ImageUnusableError) as error:
        reason = error_reason(error)
        if isinstance(error, OSError):
            remedy = "check the disk of the server, and build or import the image again"
            reason = f"{reason}; {remedy} (sandbox profile build {image.profile})."
        _log.warning("The image %s is not sent to a worker: %s", image.name, reason)
        message = f"The server cannot read the image {image.name}; its log has the reason and the remedy."
        raise ImageUnreadableError(message) from error


async def _send(message: ImagePart | ImageNotSent, writer: asyncio.StreamWriter) -> None:
    writer.write(encode_message(message))
    async with asyncio.timeout(_PART_TIMEOUT_SECONDS):
        await writer.drain()


async def _wait_for_close(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(_PART_TIMEOUT_SECONDS):
        await reader.read(1)


def _close(opening: Future[ImageContent]) -> None:
    """Close an image. A cancelled transfer's thread may still be opening the image, so wait for that thread."""
    with contextlib.suppress(OSError, SandboxError, CancelledError):
        opening.result().close()
