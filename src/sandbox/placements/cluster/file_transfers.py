"""Transfers files between the server and workers: receives artifacts and sends images.

Disk operations run in threads, but no thread waits for a worker, because a worker may send or receive arbitrarily
slowly.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import msgspec

from sandbox.interfaces.images import (
    ImageContent,
    ImageReference,
    ImageSource,
    ImageTransfersBusyError,
    ImageUnreadableError,
    ImageUnusableError,
)
from sandbox.interfaces.journal import ArtifactCopy, TaskReplicas
from sandbox.interfaces.worker_messages import WORKER_MESSAGE_BYTES_MAX, ArtifactPart, ImageNotSent, ImagePart
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import WORKER_ARTIFACTS_MAX
from sandbox.placements.cluster.job_state import Job
from sandbox.primitives.message_stream import InvalidMessageError, encode_message, read_message

T = TypeVar("T")
_log = logging.getLogger(__name__)

ARTIFACTS_BYTES_MAX = 8 * 1024**3
"""Maximum total size of a task's artifacts. A correct worker sends less, because it enforces lower limits."""

_ARTIFACT_OVERHEAD_BYTES = 4096
"""Size that is counted for each artifact in addition to its content."""

_UPLOAD_THREADS = 4
_PART_TIMEOUT_SECONDS = 60.0
_UPLOAD_SECONDS = 120.0
_UPLOAD_BYTES_PER_SECOND = 128 * 1024
"""An upload may take `_UPLOAD_SECONDS` plus the time that its content takes at this rate."""

_decoder = msgspec.msgpack.Decoder(ArtifactPart)


class ArtifactsTooLargeError(Exception):
    """An artifact has a negative size, or the task's artifacts exceed the limit on their number or total size."""


class ArtifactQuota:
    """The limits on the number and the total size of a task's artifacts.

    sizes: the sizes of the stored artifacts, keyed by name.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)
        self._total_bytes = sum(size + _ARTIFACT_OVERHEAD_BYTES for size in sizes.values())

    def check(self, artifact: Artifact) -> None:
        """Raise ArtifactsTooLargeError if the artifact must not be stored.

        A stored artifact with the same name does not count, because it will be replaced.
        """
        if artifact.size_bytes < 0 or self._total_with(artifact) > ARTIFACTS_BYTES_MAX:
            raise ArtifactsTooLargeError("The artifacts are too large.")
        if artifact.name not in self._sizes and len(self._sizes) >= WORKER_ARTIFACTS_MAX:
            raise ArtifactsTooLargeError(f"There are more than {WORKER_ARTIFACTS_MAX} artifacts.")

    def add(self, artifact: Artifact) -> None:
        """Count an artifact that was stored."""
        self._total_bytes = self._total_with(artifact)
        self._sizes[artifact.name] = artifact.size_bytes

    def _total_with(self, artifact: Artifact) -> int:
        replaced = self._sizes.get(artifact.name, -_ARTIFACT_OVERHEAD_BYTES)
        return self._total_bytes + artifact.size_bytes - replaced


class _JobUploads:
    """The uploads of a job. lock: allows only one upload at a time. quota: None before the first upload."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.quota: ArtifactQuota | None = None


class ArtifactUploads:
    """Stores the artifacts of all jobs, one at a time for each job. Everything runs on one event loop."""

    def __init__(self, replicas: TaskReplicas) -> None:
        self._replicas = replicas
        self._threads = ThreadPoolExecutor(
            _UPLOAD_THREADS, "upload"
        )  # the process waits for these threads before it exits
        self._jobs: WeakKeyDictionary[Job, _JobUploads] = WeakKeyDictionary()

    async def receive(
        self, job: Job, artifact: Artifact, reader: asyncio.StreamReader, is_current: Callable[[], bool]
    ) -> bool:
        """Store an artifact. Returns False if the server cannot store it now.

        is_current: returns whether the worker may still change files of the task.

        Raises ArtifactsTooLargeError; OSError or InvalidMessageError if the upload is incomplete, too slow or invalid.
        """
        task_id, uploads = job.stored.task_id, self._jobs.setdefault(job, _JobUploads())
        if uploads.lock.locked():
            raise InvalidMessageError("another upload has not ended")
        async with uploads.lock:
            if uploads.quota is None:
                uploads.quota = ArtifactQuota(await self._run(self._replicas.artifact_sizes, task_id))
            uploads.quota.check(artifact)
            async with asyncio.timeout(_UPLOAD_SECONDS + artifact.size_bytes / _UPLOAD_BYTES_PER_SECOND):
                is_stored = await self._store(
                    task_id, artifact, _ContentReader(reader, artifact.size_bytes), is_current
                )
            if is_stored:
                uploads.quota.add(artifact)
            return is_stored

    async def _store(
        self, task_id: str, artifact: Artifact, content: "_ContentReader", is_current: Callable[[], bool]
    ) -> bool:
        creating = self._threads.submit(self._replicas.create_artifact, task_id, artifact)
        try:
            copy = await asyncio.wrap_future(creating)
            while data := await content.read():
                await self._run(copy.write, data)
            await self._run(copy.flush)
            # Do not await between the check and `publish`: a worker must not replace anything after a takeover.
            if not is_current():
                raise _UploadBrokenError("the session has ended")
            copy.publish()
            await self._run(copy.close)
        except _UploadBrokenError:
            raise
        except (OSError, SandboxError) as error:
            _log.warning("An artifact of task %s was not stored: %s", task_id, error_reason(error))
            while await content.read():  # the worker reads the answer after it has sent everything
                pass
            return False
        finally:
            self._threads.submit(_close_artifact, creating)
        return True

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))


def _close_artifact(creating: Future[ArtifactCopy]) -> None:
    """Remove an artifact if it is incomplete.

    If the upload was cancelled, the creation of the artifact may still be running, so wait for its end.
    """
    with contextlib.suppress(OSError, SandboxError, CancelledError):
        creating.result().close()


class _UploadBrokenError(ConnectionError):
    """The upload was interrupted."""


class _ContentReader:
    """The content of an artifact, as it arrives."""

    def __init__(self, reader: asyncio.StreamReader, size_bytes: int) -> None:
        self._reader = reader
        self._rest_bytes = size_bytes
        self._is_read = False

    async def read(self) -> bytes:
        """Return the next part; empty at the end. Raises _UploadBrokenError, InvalidMessageError."""
        if self._is_read:
            return b""
        try:
            async with asyncio.timeout(_PART_TIMEOUT_SECONDS):
                part = await read_message(self._reader, _decoder, WORKER_MESSAGE_BYTES_MAX)
        except OSError as error:
            raise _UploadBrokenError(f"the upload was interrupted: {error_reason(error)}") from error
        if part is None:
            raise _UploadBrokenError("the upload ended early")
        self._is_read = not part.data
        self._rest_bytes -= len(part.data)
        if self._rest_bytes < 0:
            raise InvalidMessageError("an artifact is larger than its record")
        return part.data


TRANSFERS_MAX = 64
"""Maximum number of images that are sent at once, to all workers. Each transfer needs less than 2 MiB of memory."""

_IMAGE_THREADS = 2
_TRANSFER_SECONDS = 300.0
_IMAGE_BYTES_PER_SECOND = 128 * 1024
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
        self._threads = ThreadPoolExecutor(_IMAGE_THREADS, "image")
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
            message = f"The server is sending {TRANSFERS_MAX} images, the maximum; the worker retries later."
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
            async with asyncio.timeout(_TRANSFER_SECONDS + image.size_bytes / _IMAGE_BYTES_PER_SECOND):
                content = await _reading(image, opening)
                while data := await _reading(image, self._threads.submit(content.read)):
                    await _send(ImagePart(data), writer)
                await _send(ImagePart(b""), writer)
        finally:
            self._threads.submit(_close_image, opening)


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


def _close_image(opening: Future[ImageContent]) -> None:
    """Close an image. A cancelled transfer's thread may still be opening the image, so wait for that thread."""
    with contextlib.suppress(OSError, SandboxError, CancelledError):
        opening.result().close()
