"""The image of the worker's task: fetched from the server, unless this host has it."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import msgspec

from sandbox.interfaces.images import (
    Image,
    ImageCopies,
    ImageReceptionBusyError,
    ImageReference,
    ImageTransfersBusyError,
    ImageUnreadableError,
    ImageUnusableError,
)
from sandbox.interfaces.worker_messages import (
    SERVER_MESSAGE_BYTES_MAX,
    ImageNotSent,
    ImagePart,
    ImagePreparationStatus,
    PreparedImage,
    PrepareImage,
)
from sandbox.model.errors import SandboxError, error_reason
from sandbox.primitives.message_stream import InvalidMessageError, StreamPair, read_message

PART_TIMEOUT_SECONDS = 60.0
"""Time limit for each part of an image."""

_RETRY_SECONDS, _RETRY_SECONDS_MAX = 5.0, 60.0
"""The pause after the first failed attempt to fetch an image, and the maximum: each further pause is twice as long."""

_PROBLEM_CHARACTERS_MAX = 1024
_decoder: "msgspec.msgpack.Decoder[ImagePart | ImageNotSent]" = msgspec.msgpack.Decoder(ImagePart | ImageNotSent)
_NOT_SENT = {error.code: error for error in (ImageTransfersBusyError, ImageUnreadableError)}

OpenImage = Callable[[str], Awaitable[StreamPair]]
"""Opens a connection on which the server sends the image with this digest. Raises OSError."""


class _Fetch:
    """One attempt to fetch an image. retry_seconds: the pause before the next attempt if this attempt fails."""

    def __init__(self, image: ImageReference, copies: ImageCopies, open_image: OpenImage, retry_seconds: float) -> None:
        self.image = image
        self.retry_seconds = retry_seconds
        self.received_bytes = 0
        self.ended_at = 0.0
        self._copies = copies
        self.running = asyncio.create_task(self._run(open_image))

    async def _run(self, open_image: OpenImage) -> None:
        try:
            try:
                reader, writer = await open_image(self.image.digest)
            except OSError as error:
                raise ConnectionError(error_reason(error)) from error
            with contextlib.closing(writer):
                await self._receive(reader)
        finally:
            self.ended_at = time.monotonic()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()

        async def read_part() -> bytes:
            async with asyncio.timeout(PART_TIMEOUT_SECONDS):
                part = await read_message(reader, _decoder, SERVER_MESSAGE_BYTES_MAX)
            if part is None:
                raise ConnectionError("the server stopped sending the image")
            if isinstance(part, ImageNotSent):
                raise _NOT_SENT[part.code](part.message)
            self.received_bytes += len(part.data)
            return part.data

        def read() -> bytes:
            try:
                return asyncio.run_coroutine_threadsafe(read_part(), loop).result()
            except (InvalidMessageError, OSError) as error:
                raise ConnectionError(error_reason(error)) from error

        await asyncio.to_thread(self._copies.receive, self.image, read)


class TaskImage:
    """Prepares the image of the task. tier: the isolation tier of the host's runtime."""

    def __init__(self, copies: ImageCopies, tier: str) -> None:
        self._copies = copies
        self._tier = tier
        self._prepared: tuple[str, PreparedImage | None] | None = None
        """The profile and the image that were prepared last."""
        self._found: set[Image] = set()
        """All images that were prepared for the task. They stay locked until this process ends."""
        self._fetch: _Fetch | None = None
        self._pause_seconds = 0.0
        """The maximum pause after the last attempt to fetch an image; 0 after a success."""

    async def prepare(self, request: PrepareImage, open_image: OpenImage) -> ImagePreparationStatus:
        """Carry out a request, without waiting for an image to arrive.

        Raises ImageUnusableError if no further request can succeed; OSError.
        """
        wanted = request.image
        if wanted is None:
            await asyncio.to_thread(self._copies.check_no_own_image, request.profile)
            self._prepared = request.profile, None
            return ImagePreparationStatus(is_ready=True)
        copy = await asyncio.to_thread(self._copies.find, wanted, self._tier)
        if copy is not None:
            prepared = PreparedImage(copy.digest, copy.directory)
            self._found.add(copy)
            self._prepared, self._fetch, self._pause_seconds = (request.profile, prepared), None, 0.0
            return ImagePreparationStatus(is_ready=True, image=prepared)
        return self._continue_fetch(wanted, open_image)

    def _continue_fetch(self, wanted: ImageReference, open_image: OpenImage) -> ImagePreparationStatus:
        fetch = self._fetch
        if fetch is None or (fetch.running.done() and fetch.image.digest != wanted.digest):
            self._pause_seconds = min(max(_RETRY_SECONDS, 2 * self._pause_seconds), _RETRY_SECONDS_MAX)
            # The pause is random, because many workers may be refused at the same time.
            pause = self._pause_seconds * random.uniform(0.5, 1)  # noqa: S311
            fetch = self._fetch = _Fetch(wanted, self._copies, open_image, pause)
        if not fetch.running.done():
            return ImagePreparationStatus(is_ready=False, received_bytes=fetch.received_bytes)
        if time.monotonic() - fetch.ended_at >= fetch.retry_seconds:
            self._fetch = None
        problem = _describe_end(fetch.running)
        return ImagePreparationStatus(is_ready=False, problem=problem[:_PROBLEM_CHARACTERS_MAX])

    def check(self, image: Image) -> None:
        """Check that an image in an order was prepared for the task. Raises InvalidMessageError."""
        if image not in self._found:
            raise InvalidMessageError(f"the image {image.name} in {image.directory} was not prepared for this task")

    def find(self, profile: str) -> PreparedImage | None:
        """Return the image that was prepared last; None for the host's own /usr. Raises ImageUnusableError."""
        if self._prepared is None or self._prepared[0] != profile:
            raise ImageUnusableError(f"This worker has prepared no image of the profile {profile}.")
        return self._prepared[1]


def _describe_end(running: "asyncio.Task[None]") -> str:
    """Return why a fetch failed. Raises ImageUnusableError if a retry is useless, and OSError if this host failed."""
    if running.cancelled():
        return "The worker is ending."
    match running.exception():
        case ImageUnusableError() as error:
            raise error
        case ImageReceptionBusyError():
            return "Another worker on the host is fetching it."
        case ImageTransfersBusyError() as error:
            return error.message
        case (SandboxError() | ConnectionError() | TimeoutError()) as error:
            return f"It was not fetched: {error_reason(error).rstrip('.')}."
        case None:
            return ""
        case error:
            raise error
