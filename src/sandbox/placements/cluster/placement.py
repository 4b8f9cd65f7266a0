"""Runs attempts on workers that an engine starts."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from sandbox.interfaces.cluster_engine import Engine, EngineUnavailableError, JobStatus, WorkerVerifier
from sandbox.interfaces.images import Image, ImageSource, ImageUnusableError, ProfileCatalog
from sandbox.interfaces.journal import JournalBusyError, JournalWriter, LockState, TaskReplicas
from sandbox.interfaces.placement import (
    AttemptLocation,
    HostIdentity,
    HostPendingError,
    HostStatus,
    Leftover,
    LeftoverScan,
    Loss,
    ProbeResult,
    ReservedHost,
)
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunnerNotStartedError
from sandbox.interfaces.worker_messages import (
    RECORD_BATCH_BYTES,
    SERVER_RECORD_BYTES_MAX,
    FindImage,
    HasDisk,
    HasDiskOrHandle,
    HasSameSecrets,
    HasSandboxHandle,
    Launch,
    PreparedImage,
    ReadEndOffset,
    ReceiveRecords,
    Request,
)
from sandbox.model.errors import DECODE_ERRORS, SandboxError, error_reason
from sandbox.model.failure import FailureCode
from sandbox.model.isolation_tier import TIERS
from sandbox.model.printable import replace_unprintable, replacement_character
from sandbox.model.resources import Resources
from sandbox.placements.cluster.claim_checks import Claims, SharedHostKey
from sandbox.placements.cluster.credential_requests import FindCloneCredentials
from sandbox.placements.cluster.event_loop_thread import LoopThread
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.host_statuses import ClusterHosts, EngineHosts, SeenHosts
from sandbox.placements.cluster.job_store import JobStore
from sandbox.placements.cluster.jobs import Job, Jobs, JobSettings
from sandbox.placements.cluster.remote_runners_and_disks import RemotePreservedDisk, RemoteRunnerHandle
from sandbox.placements.cluster.requests_to_workers import LAUNCH_SECONDS, Workers
from sandbox.placements.cluster.worker_server import HostRequestProviders, StoreLog, WorkerServer
from sandbox.placements.cluster.worker_session import WorkerSession, prepare_image
from sandbox.primitives.files import write_durably
from sandbox.primitives.message_stream import InvalidMessageError

_log = logging.getLogger(__name__)

_COPY_SECONDS = 20.0
"""Time limit for sending the records before a launch, because the caller holds a slot that other tasks need."""

_RESERVE_SECONDS = 1.0
_RELEASE_SECONDS, _RELEASE_SECONDS_MAX = 1.0, 60.0


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
        return ProbeResult((), "", TIERS[-1], is_final=True)


class ClusterFiles:
    """Implements `interfaces.placement.AttemptFiles`. Workers remove the leftovers on their hosts themselves."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def has_disk(self, location: AttemptLocation) -> bool:
        """Implements `AttemptFiles.has_disk`."""
        return self._ask(location, HasDisk(location.attempt_id))

    def has_disk_or_handle(self, location: AttemptLocation) -> bool:
        """Implements `AttemptFiles.has_disk_or_handle`."""
        return self._ask(location, HasDiskOrHandle(location.attempt_id))

    def has_same_secrets(self, location: AttemptLocation, secrets: Mapping[str, str]) -> bool:
        """Implements `AttemptFiles.has_same_secrets`."""
        return self._ask(location, HasSameSecrets(location.attempt_id, dict(secrets)))

    def has_sandbox_handle(self, task_id: str) -> bool:
        """Implements `AttemptFiles.has_sandbox_handle`."""
        job = self._workers.jobs.of_task(task_id)
        if job is None:
            return False
        return self._ask(AttemptLocation(task_id, job.stored.attempt_ids[-1], job.identity.name), HasSandboxHandle())

    async def scan(self) -> LeftoverScan:
        """Return no leftovers, because each worker removes the leftovers on its host when it starts."""
        return LeftoverScan((), {})

    async def clean_up(self, leftover: Leftover, *, keeps_disk: bool) -> None:
        """Do nothing; see `scan`."""

    async def clean_up_unowned(self, kind: str, attempt_id: str) -> None:
        """Do nothing; see `scan`."""

    def _ask(self, location: AttemptLocation, request: Request) -> bool:
        """Send a request to the attempt's worker. A worker that was abandoned or never started has no files."""
        if not self._workers.has_files(location):
            return False
        return bool(self._workers.request_blocking(location, request, bool))


class ClusterAllocator:
    """Implements `interfaces.placement.HostAllocator`: one worker for each task."""

    def __init__(
        self, workers: Workers, hosts: ClusterHosts, images: ImageSource, largest_host_sizes: Sequence[Resources]
    ) -> None:
        self.largest_host_sizes = largest_host_sizes
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


class ClusterPlacement:
    """Implements `interfaces.placement.Placement`.

    largest_host_sizes: the resources for tasks on each of the largest hosts.
    """

    def __init__(
        self,
        workers: Workers,
        hosts: ClusterHosts,
        images: ImageSource,
        largest_host_sizes: Sequence[Resources],
        storage: "TaskStorage",
    ) -> None:
        largest = max(largest_host_sizes, key=lambda each: (each.memory_bytes, each.cpus, each.disk_bytes))
        self.host = AnyClusterHost(largest, images)
        self.files = ClusterFiles(workers)
        self.allocator = ClusterAllocator(workers, hosts, images, largest_host_sizes)
        self._workers = workers
        self._replicas = storage.replicas
        self._has_task_ended = storage.has_task_ended

    async def run(self) -> None:
        """Release the workers of tasks that ended while no server ran; end the thread on cancellation."""
        try:
            await self._release_ended()
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(self._workers.thread.close)

    async def _release_ended(self) -> None:
        """Release the workers of tasks that have ended. Failures are retried."""
        waiting, pause = set(self._workers.jobs.task_ids()), _RELEASE_SECONDS
        while waiting:
            for task_id in sorted(waiting):
                try:
                    if await asyncio.to_thread(self._has_task_ended, task_id):
                        await self.allocator.release_host(task_id)
                    waiting.discard(task_id)
                except (OSError, SandboxError) as error:
                    _log.warning("The worker of task %s is not released yet: %s", task_id, error_reason(error))
            if waiting:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RELEASE_SECONDS_MAX)

    async def launch(self, order: RunAttempt | FinishAttempt, writer: JournalWriter) -> RemoteRunnerHandle:
        """Send the records that the worker lacks, then the order. Implements `Placement.launch`."""
        await asyncio.to_thread(writer.sync)
        job, session = self._check_session(self._workers.jobs.of_task(order.task_id), order)
        session.begin_launch()
        # A cancelled launch continues, and may start the runner.
        await asyncio.shield(self._workers.thread.run(self._launch(job, session, order)))
        return self.find_runner(AttemptLocation(order.task_id, order.attempt_id, ""))

    async def _launch(self, job: Job, session: WorkerSession, order: RunAttempt | FinishAttempt) -> None:
        try:
            try:
                async with asyncio.timeout(_COPY_SECONDS):
                    offset = await self._copy(session, order.task_id)
                session.record_copied(max(session.copied_end_offset, offset))
                await session.launch(Launch(order), LAUNCH_SECONDS)
            except InvalidMessageError as error:
                with contextlib.suppress(OSError):  # the fence takes effect even if it cannot be stored
                    self._workers.jobs.fence(job, error_reason(error))
                session.close()
                raise RunnerNotStartedError(error_reason(error)) from error
            except OSError as error:  # the host is the cause, so another attempt may succeed
                raise RunnerNotStartedError(error_reason(error)) from error
        finally:
            session.end_launch()

    async def _copy(self, session: WorkerSession, task_id: str) -> int:
        """Send the records that the worker lacks; return the offset after them.

        A slow worker gets the rest at the next launch. Raises OSError, InvalidMessageError.
        """
        end = await asyncio.to_thread(self._replicas.end_offset, task_id)
        offset = int(await session.call(ReadEndOffset(), int))
        if not 0 <= offset <= end:
            raise InvalidMessageError(f"its journal has {offset} bytes, and the server's has {end}")
        while data := await asyncio.to_thread(self._read, task_id, offset):
            received = int(await session.call(ReceiveRecords(offset, data), int))
            if received != offset + len(data):
                raise InvalidMessageError(f"its journal has {received} bytes instead of {offset + len(data)}")
            offset = received
        return offset

    def _read(self, task_id: str, offset: int) -> bytes:
        data = self._replicas.read(task_id, offset, RECORD_BATCH_BYTES)
        return data or self._replicas.read(task_id, offset, SERVER_RECORD_BYTES_MAX)

    def _check_session(self, job: Job | None, order: RunAttempt | FinishAttempt) -> tuple[Job, WorkerSession]:
        session = None if job is None or job.stored.is_abandoned else job.session
        if job is None or not isinstance(session, WorkerSession):
            raise RunnerNotStartedError(f"The worker of task {order.task_id} is not responding.")
        if order.attempt_id not in job.stored.attempt_ids:
            raise RunnerNotStartedError(f"Attempt {order.attempt_id} does not belong to this worker.")
        if session.lock_state is LockState.HELD:
            raise JournalBusyError(f"Task {order.task_id} has a runner on {job.identity.name}.")
        return job, session

    def find_runner(self, location: AttemptLocation) -> RemoteRunnerHandle:
        """Implements `Placement.find_runner`."""
        return RemoteRunnerHandle(self._workers, location)

    def preserved_disk(self, location: AttemptLocation) -> RemotePreservedDisk:
        """Implements `Placement.preserved_disk`."""
        return RemotePreservedDisk(self._workers, location)


class ListenAddress(NamedTuple):
    """The address for workers, the server's certificate, and how workers prove their claims; see `Claims`."""

    host: str
    port: int
    tls: ssl.SSLContext
    proof_method: SharedHostKey | WorkerVerifier | None = None


class TaskStorage(NamedTuple):
    """The server's storage for the files of tasks.

    replicas: the copies of journals and artifacts. store_log: see `StoreLog`.
    has_task_ended: returns whether a task has ended or is gone. Blocks.
    """

    replicas: TaskReplicas
    store_log: StoreLog
    has_task_ended: Callable[[str], bool]


async def load_largest_host_sizes(engine: Engine, file: Path) -> Sequence[Resources]:
    """Return the sizes of the largest hosts.

    If the engine is not responding, returns the stored ones, so that workers can reconnect.
    Raises EngineUnavailableError if none are stored, OSError.
    """
    try:
        hosts = await engine.largest_host_sizes()
    except EngineUnavailableError as error:
        try:
            stored = msgspec.json.decode(file.read_bytes(), type=tuple[Resources, ...])
        except (OSError, *DECODE_ERRORS):
            raise error from None
        if not stored:
            raise
        _log.warning("The sizes of the hosts are those that the last server found: %s", error.message)
        return stored
    write_durably(file, msgspec.json.encode(tuple(hosts)))
    return hosts


async def create_cluster_placement(
    directory: Path,
    engine: Engine,
    settings: JobSettings,
    address: ListenAddress,
    storage: TaskStorage,
    images: ImageSource,
    find_credentials: FindCloneCredentials,
) -> ClusterPlacement:
    """Load the jobs, listen for workers and start the thread. Raises OSError, SandboxError.

    directory: where the jobs are stored.
    """
    hosts = await load_largest_host_sizes(engine, directory.with_name("largest-hosts.json"))
    largest_host_sizes = [
        msgspec.structs.replace(host, memory_bytes=host.memory_bytes - settings.overhead_bytes) for host in hosts
    ]
    seen_hosts, drains = SeenHosts(directory.with_name("hosts.json")), HostDrains(directory.with_name("drained.json"))
    thread, engine_hosts = LoopThread(), EngineHosts(engine)

    async def start() -> Jobs:
        jobs = Jobs(JobStore(directory), engine, settings, drains)
        server = WorkerServer(
            Claims(jobs, drains, address.proof_method),
            seen_hosts,
            storage.replicas,
            storage.store_log,
            storage.has_task_ended,
            HostRequestProviders(find_credentials, images),
            address.tls,
        )
        await server.listen(address.host, address.port)
        jobs.start()
        seen_hosts.start()
        engine_hosts.start()
        return jobs

    try:
        jobs = await thread.run(start())
        cluster_hosts = ClusterHosts(seen_hosts, engine_hosts, drains, jobs)
        return ClusterPlacement(Workers(jobs, thread), cluster_hosts, images, largest_host_sizes, storage)
    except BaseException:
        await asyncio.to_thread(thread.close)
        raise
