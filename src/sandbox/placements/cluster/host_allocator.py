"""Finds hosts for tasks: submits a worker for each task, and has the worker prepare its host."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.images import Image, ImageReference, ImageSource, ImageUnusableError, ProfileCatalog
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import (
    AttemptLocation,
    HostIdentity,
    HostPendingError,
    HostStatus,
    Loss,
    ProbeResult,
    ReservedHost,
)
from sandbox.interfaces.worker_messages import FindImage, ImagePreparationStatus, PreparedImage, PrepareImage
from sandbox.model.errors import error_reason
from sandbox.model.failure import FailureCode
from sandbox.model.isolation_tier import TIERS
from sandbox.model.printable import replace_unprintable, replacement_character
from sandbox.model.resources import Resources
from sandbox.placements.cluster.host_inventory import ClusterHosts
from sandbox.placements.cluster.job_state import Job
from sandbox.placements.cluster.requests_to_workers import WorkerClient
from sandbox.placements.cluster.worker_session import WorkerSession

_RESERVE_SECONDS = 1.0


class AnyClusterHost:
    """Implements `interfaces.placement.Host`: any host of the cluster.

    capacity: the capacity of the host with the most memory.
    images: the profiles that tasks may name. Hosts copy the images (`ReservedHost.find_image`).
    """

    def __init__(self, capacity: Resources, images: ProfileCatalog) -> None:
        self.identity = HostIdentity("cluster:", "")
        self.capacity = capacity
        self.images = images

    def blocked_reason(self) -> str | None:
        """Return None, because tasks can be queued even while the engine is not responding."""
        return None

    def memory_available_bytes(self) -> int | None:
        """Return None, because the engine reserves the memory of a task."""
        return None

    async def probe(self) -> ProbeResult:
        """Return a successful result, because each worker probes its own host."""
        return ProbeResult((), "", TIERS[-1], is_permanent=True)


class ClusterAllocator:
    """Implements `interfaces.placement.HostAllocator`: one worker for each task."""

    def __init__(
        self, workers: WorkerClient, hosts: ClusterHosts, images: ImageSource, maximal_host_sizes: Sequence[Resources]
    ) -> None:
        self.maximal_host_sizes = maximal_host_sizes
        self._images = images
        self._workers = workers
        self._hosts = hosts

    async def reserve_host(
        self, task_id: str, last_attempt_id: str | None, resources: Resources, profile: str
    ) -> ReservedHost:
        """Return the host of the task's worker; submit a job if the task has no worker.

        Implements `HostAllocator.reserve_host`.
        """
        return await self._workers.thread.run(self._reserve(task_id, last_attempt_id, resources, profile))

    async def _reserve(
        self, task_id: str, last_attempt_id: str | None, resources: Resources, profile: str
    ) -> ReservedHost:
        jobs = self._workers.jobs
        job = jobs.reserve(task_id, last_attempt_id, resources)
        if not _is_ready(job):
            await job.wait_for_change(_RESERVE_SECONDS)
        if not _is_ready(job):
            status = jobs.status(task_id)
            reason = job.reason if status is None else status.reason
            raise HostPendingError(f"The host {job.identity.name} is not responding." if job.is_claimed else reason)
        try:
            find_image = await self._prepare_image(job, profile)
        except HostPendingError:
            await asyncio.sleep(_RESERVE_SECONDS)  # the worker answers at once, and the caller asks again at once
            raise
        return ReservedHost(job.stored.attempt_ids[-1], job.identity, job.stored.runtime, find_image)

    async def _prepare_image(self, job: Job, profile: str) -> Callable[[str], Image | None]:
        """Have the worker fetch the server's image of a profile; return the attempt's `ReservedHost.find_image`.

        Raises HostPendingError until the host has the image.
        """
        host, session = job.stored.host, job.session
        if not isinstance(session, WorkerSession):
            raise HostPendingError(f"The host {host} is not responding.")
        try:
            wanted = await asyncio.to_thread(self._images.find_reference, profile)
            preparation = await prepare_image(session, profile, wanted, _RESERVE_SECONDS)
        except ImageUnusableError as error:
            return partial(_raise, error)
        except OSError as error:
            reason = f"The host {host} cannot prepare the image of the task: {error_reason(error)}."
            raise HostPendingError(replace_unprintable(reason, replacement_character)) from error
        if preparation.is_ready:
            prepared = preparation.image
            image = None if prepared is None else Image(profile, prepared.digest, prepared.directory)
            return lambda _: image
        assert wanted is not None, "prepare_image has checked it"
        percent = min(99, 100 * preparation.received_bytes // max(1, wanted.size_bytes))
        reason = f"The host {host} is fetching the image {wanted.name} ({percent} %). {preparation.problem}"
        raise HostPendingError(replace_unprintable(reason.rstrip(), replacement_character))

    def job_status(self, task_id: str) -> JobStatus | None:
        """Implements `HostAllocator.job_status`."""
        return self._workers.jobs.status(task_id)

    def host_statuses(self) -> Sequence[HostStatus]:
        """Implements `HostAllocator.host_statuses`."""
        return self._hosts.statuses()

    async def drain_host(self, name: str) -> None:
        """Implements `HostAllocator.drain_host`."""
        await self._workers.thread.run(self._hosts.drain(name))

    async def undo_host_drain(self, name: str) -> None:
        """Implements `HostAllocator.undo_host_drain`."""
        await self._workers.thread.run(self._hosts.undo_drain(name))

    def find_image(self, location: AttemptLocation, profile: str) -> Image | None:
        """Request the image from the attempt's worker. Implements `HostAllocator.find_image`."""
        found: PreparedImage | None = self._workers.request_blocking(location, FindImage(profile), PreparedImage | None)
        return None if found is None else Image(profile, found.digest, found.directory)

    def find_loss(self, location: AttemptLocation) -> Loss | None:
        """Return how the attempt was lost if its worker was abandoned. Implements `HostAllocator.find_loss`."""
        job = self._workers.jobs.of_attempt(location.attempt_id)
        if job is None:
            return Loss(FailureCode.HOST_LOST) if self._workers.jobs.have_earlier_leases_ended else None
        if not job.stored.is_abandoned:
            return None
        code = FailureCode.RUNNER_LOST if job.stored.was_end_confirmed else FailureCode.HOST_LOST
        return Loss(code, job.stored.loss_reason)

    async def release_host(self, task_id: str) -> None:
        """Implements `HostAllocator.release_host`."""
        await self._workers.thread.run(self._release(task_id))

    async def _release(self, task_id: str) -> None:
        self._workers.jobs.notify_task_ended(task_id)


def _raise(error: ImageUnusableError, _profile: str) -> Image | None:
    raise error


def _is_ready(job: Job) -> bool:
    """Return whether the worker has sent its first heartbeat, which means that its host is prepared."""
    session = job.session
    return session is not None and session.lock_state is not LockState.UNKNOWN and not job.stored.is_abandoned


async def prepare_image(
    session: WorkerSession, profile: str, image: ImageReference | None, timeout_seconds: float
) -> ImagePreparationStatus:
    """Have a worker fetch an image unless its host has the image. Raises ImageUnusableError, OSError.

    image: None if the server has no image of the profile.
    """
    session.image_offer.replace(image)
    answer: ImagePreparationStatus = await session.call(
        PrepareImage(profile, image), ImagePreparationStatus, timeout_seconds
    )
    has_image = (answer.image and answer.image.digest) == (image and image.digest)
    if not (has_image if answer.is_ready else image is not None):
        expected = "the host's own /usr" if image is None else image.name
        raise ImageUnusableError(f"The worker has prepared another image instead of {expected}.")
    if answer.is_ready:
        session.image_offer.replace(None)
    return answer
