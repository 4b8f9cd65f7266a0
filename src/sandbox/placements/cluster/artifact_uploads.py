"""Stores the artifacts that workers send.

Disk operations run in threads, but no thread waits for a worker, because a worker may send arbitrarily slowly.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import msgspec

from sandbox.interfaces.journal import ArtifactCopy, TaskReplicas
from sandbox.interfaces.worker_messages import WORKER_MESSAGE_BYTES_MAX, ArtifactPart
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import WORKER_ARTIFACTS_MAX
from sandbox.placements.cluster.job_state import Job
from sandbox.primitives.message_stream import InvalidMessageError, read_message

T = TypeVar("T")
_log = logging.getLogger(__name__)

ARTIFACTS_BYTES_MAX = 8 * 1024**3
"""Maximum total size of a task's artifacts. A correct worker sends less, because it enforces lower limits."""

_ARTIFACT_OVERHEAD_BYTES = 4096
"""Size that is counted for each artifact in addition to its content."""

_THREADS = 4
_PART_TIMEOUT_SECONDS = 60.0
_UPLOAD_SECONDS = 120.0
_BYTES_PER_SECOND = 128 * 1024
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
        self._threads = ThreadPoolExecutor(_THREADS, "upload")  # the process waits for these threads before it exits
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
            async with asyncio.timeout(_UPLOAD_SECONDS + artifact.size_bytes / _BYTES_PER_SECOND):
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
            self._threads.submit(_close, creating)
        return True

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))


def _close(creating: Future[ArtifactCopy]) -> None:
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
