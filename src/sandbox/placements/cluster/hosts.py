"""The hosts of a cluster: what the engine and the workers reported about them, and how tasks are assigned to them.

To find a host for a task, the server submits a worker, which then prepares its host.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from sandbox.interfaces.cluster_engine import Engine, EngineHost, EngineUnavailableError, JobPhase, JobStatus
from sandbox.interfaces.images import Image, ImageReference, ImageSource, ImageUnusableError, ProfileCatalog
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import (
    AttemptLocation,
    HostDrainError,
    HostIdentity,
    HostNotFoundError,
    HostPendingError,
    HostState,
    HostStatus,
    Loss,
    ProbeResult,
    ReservedHost,
)
from sandbox.interfaces.runtime import TIERS
from sandbox.interfaces.worker_messages import Claim, FindImage, ImagePreparationStatus, PreparedImage, PrepareImage
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.errors import DECODE_ERRORS, SandboxError, error_reason
from sandbox.model.failure import FailureCode
from sandbox.model.resources import Resources
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.job_state import Job
from sandbox.placements.cluster.jobs import Jobs
from sandbox.placements.cluster.worker_session import WorkerClient, WorkerSession
from sandbox.primitives.files import write_durably

HOSTS_MAX = 1000
"""Maximum number of hosts that are stored. Beyond it, the host with the earliest last contact is removed.

Of the engine's hosts, the first ones by name are listed, up to the same maximum, even if no worker has run on them.
"""

ENGINE_POLL_SECONDS = 30.0
"""Interval at which the engine is queried for its hosts."""

_ENGINE_SECONDS = 60.0
_NAME_CHARACTERS_MAX = 253

_SAVE_SECONDS = 60.0
_SILENCE_SECONDS = 15.0
"""Time without a heartbeat after which connected workers count as unreachable. They send one every two seconds."""

_log = logging.getLogger(__name__)


class SeenHost(msgspec.Struct, frozen=True, rename={"packages_digest": "packages"}):
    """A host on which a worker has claimed a task.

    last_contact: when a worker on the host last sent a message, in seconds since 1970.
    version, cpus, memory_bytes, packages_digest: sent by the last worker that connected (`Claim`); empty or 0 if it did
        not send them.
    """

    name: str
    last_contact: float
    version: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    packages_digest: str = ""


class SeenHosts:
    """The hosts on which workers have run, stored in a file. Not thread-safe, except as noted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._hosts = {host.name: host for host in load_seen_hosts(file)}
        self._is_saved = True
        self._saving: asyncio.Task[None] | None = None

    def snapshot(self) -> Sequence[SeenHost]:
        """Return the hosts. Thread-safe."""
        return list(self._hosts.values())

    def record_claim(self, claim: Claim) -> None:
        """Store what a worker reported about its host."""
        sizes = claim.cpus, claim.memory_bytes
        self.add(SeenHost(claim.host, time.time(), claim.version, *sizes, claim.packages_digest))

    def add(self, host: SeenHost) -> None:
        """Add or replace a host."""
        is_new = host.name not in self._hosts
        self._hosts[host.name] = host
        self._is_saved = False
        if len(self._hosts) > HOSTS_MAX:
            del self._hosts[min(self._hosts.values(), key=lambda host: host.last_contact).name]
        if is_new:
            self.save()

    def record_contact(self, name: str) -> None:
        """Record that a worker on the host has just sent a heartbeat, unless the host was removed."""
        if (host := self._hosts.get(name)) is not None:
            self._hosts[name] = msgspec.structs.replace(host, last_contact=time.time())
            self._is_saved = False

    def start(self) -> None:
        """Save the hosts periodically, and once more when the tasks of the event loop are cancelled."""
        self._saving = asyncio.create_task(self._save_periodically())

    async def _save_periodically(self) -> None:
        try:
            while True:
                await asyncio.sleep(_SAVE_SECONDS)
                self.save()
        finally:
            self.save()

    def save(self) -> None:
        """Save the hosts, unless nothing has changed. An error is only logged: the next call tries again."""
        if self._is_saved:
            return
        try:
            write_durably(self._file, msgspec.json.encode(tuple(self._hosts.values())))
        except OSError as error:
            _log.warning("The list of hosts was not saved: %s", error_reason(error))
            return
        self._is_saved = True


def load_seen_hosts(file: Path) -> Sequence[SeenHost]:
    """Return the stored hosts. The file serves only to inform users, so a damaged file counts as empty."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=tuple[SeenHost, ...])
    except FileNotFoundError:
        return ()
    except (OSError, *DECODE_ERRORS) as error:
        _log.warning("The list of hosts cannot be read, and starts empty: %s", error_reason(error))
        return ()


class EngineHosts:
    """The hosts that the engine reported last. Not thread-safe, except as noted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_name: Mapping[str, EngineHost] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._last_error = ""

    @property
    def by_name(self) -> Mapping[str, EngineHost] | None:
        """The hosts, keyed by name; None if the engine has not responded yet. Thread-safe."""
        return self._by_name

    async def refresh(self) -> None:
        """Query the engine for its hosts. Raises SandboxError, OSError, TimeoutError."""
        async with asyncio.timeout(_ENGINE_SECONDS):
            self._by_name = {host.name: host for host in await self._engine.hosts()}

    def start(self) -> None:
        """Query the engine for its hosts periodically, until the tasks of the event loop are cancelled."""
        self._refreshing = asyncio.create_task(self._refresh_periodically())

    async def _refresh_periodically(self) -> None:
        while True:
            error = ""
            try:
                await self.refresh()
            except (SandboxError, OSError, TimeoutError) as raised:
                error = error_reason(raised)
            if error and error != self._last_error:
                _log.warning("The engine does not list its hosts: %s", error)
            self._last_error = error
            await asyncio.sleep(ENGINE_POLL_SECONDS)


class ClusterHosts:
    """The hosts of a cluster, and their drains. Not thread-safe, except `statuses`."""

    def __init__(self, seen: SeenHosts, engine_hosts: EngineHosts, drains: HostDrains, jobs: Jobs) -> None:
        self._seen = seen
        self._engine_hosts = engine_hosts
        self._drains = drains
        self._jobs = jobs

    def statuses(self) -> Sequence[HostStatus]:
        """Return the hosts, sorted by name. Thread-safe.

        They are the hosts of the engine, the hosts that run a job or have run a worker, and the drained hosts.
        """
        now = time.time()
        return host_statuses(
            self._seen.snapshot(), self._jobs.snapshot(), now, self._engine_hosts.by_name, self._drains
        )

    async def drain(self, name: str) -> None:
        """Drain a host; see `HostAllocator.drain_host`. Raises HostNotFoundError, HostDrainError, OSError."""
        if not self._is_known(name):
            try:
                await self._engine_hosts.refresh()
            except (SandboxError, OSError, TimeoutError) as error:
                raise HostDrainError(f"The engine does not list its hosts: {error_reason(error)}") from error
            self._check_known(name)
        self._drains.start(name, datetime.now(UTC))

    async def undo_drain(self, name: str) -> None:
        """End the drain of a host. Raises HostNotFoundError, OSError."""
        self._check_known(name)
        self._drains.undo(name)

    def _check_known(self, name: str) -> None:
        if not self._is_known(name):
            shown = repr(name[:_NAME_CHARACTERS_MAX])
            raise HostNotFoundError(f"The cluster has no host {shown}; `sandbox admin hosts` lists the hosts.")

    def _is_known(self, name: str) -> bool:
        names = {host.name for host in self._seen.snapshot()}
        return name in names or name in (self._engine_hosts.by_name or {}) or self._drains.since(name) is not None


def host_statuses(
    seen: Iterable[SeenHost],
    jobs: Iterable[Job],
    now: float,
    engine_hosts: Mapping[str, EngineHost] | None,
    drains: HostDrains,
) -> Sequence[HostStatus]:
    """See `ClusterHosts.statuses`. now: in seconds since 1970. engine_hosts: None if the engine's hosts are unknown."""
    states: dict[str, tuple[HostState, str]] = {}
    for job in jobs:
        name, state, reason = _state_of_host(job)
        current = states.get(name)
        if name and (current is None or _PRECEDENCE.index(state) < _PRECEDENCE.index(current[0])):
            states[name] = state, reason
    hosts, from_engine = {host.name: host for host in seen}, engine_hosts or {}
    names = {*states, *hosts, *drains.names, *sorted(from_engine)[:HOSTS_MAX]}
    statuses = []
    for name in sorted(names):
        engine_host = from_engine.get(name)
        problem = "" if engine_host is None else engine_host.problem
        if engine_hosts is not None and engine_host is None:
            problem = "The engine has no host with this name."
        idle = (HostState.NOT_READY, problem) if problem else (HostState.IDLE, "No worker is running on the host.")
        status = _status(name, hosts.get(name), *states.get(name, idle), now)
        if engine_host is not None:
            resources = engine_host.resources
            cpus, memory_bytes = status.cpus or resources.cpus, status.memory_bytes or resources.memory_bytes
            status = msgspec.structs.replace(status, cpus=cpus, memory_bytes=memory_bytes)
        reason = problem if status.state is HostState.READY else status.reason
        statuses.append(msgspec.structs.replace(status, reason=reason, draining_since=drains.since(name)))
    return statuses


_PRECEDENCE = (HostState.READY, HostState.UNREACHABLE, HostState.IDLE)
"""If the jobs of a host result in different states, the first of these states applies."""

_NO_RESPONSE = "No worker on the host is responding."


def _state_of_host(job: Job) -> tuple[str, HostState, str]:
    """Return the name of a job's host, the host's state, and the reason. The name is empty if the job has no host."""
    stored, status = job.stored, job.status
    if not job.is_claimed:
        is_starting = status is not None and status.phase is JobPhase.RUNNING and not stored.is_abandoned
        return status.host if status and is_starting else "", HostState.IDLE, "A worker is starting on the host."
    if stored.was_end_confirmed or stored.is_abandoned or job.phase is JobPhase.ENDED:
        return "", HostState.IDLE, ""
    if job.session is not None:
        return stored.host, HostState.READY, ""
    reason = f"{_NO_RESPONSE} {job.reason}" if job.phase is JobPhase.UNREACHABLE else _NO_RESPONSE
    return stored.host, HostState.UNREACHABLE, reason


def _status(name: str, seen: SeenHost | None, state: HostState, reason: str, now: float) -> HostStatus:
    if seen is None:
        return HostStatus(name, state, reason)
    if state is HostState.READY and now - seen.last_contact > _SILENCE_SECONDS:
        state, reason = HostState.UNREACHABLE, _NO_RESPONSE
    last_contact_at = datetime.fromtimestamp(seen.last_contact, UTC)
    return HostStatus(name, state, reason, seen.cpus or None, seen.memory_bytes or None, seen.version, last_contact_at)


async def load_largest_host_sizes(engine: Engine, file: Path) -> Sequence[Resources]:
    """Return the sizes of the largest hosts.

    If the engine is not responding, returns the stored ones, so that workers can reconnect.
    Raises EngineUnavailableError if none are stored, OSError.
    """
    try:
        hosts = await engine.maximal_host_sizes()
    except EngineUnavailableError as error:
        try:
            stored = msgspec.json.decode(file.read_bytes(), type=tuple[Resources, ...])
        except (OSError, *DECODE_ERRORS):
            raise error from None
        if not stored:
            raise
        _log.warning("Using the host sizes that the previous server stored: %s", error.message)
        return stored
    write_durably(file, msgspec.json.encode(tuple(hosts)))
    return hosts


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
            raise HostPendingError(f"The host {job.stored.host} is not responding." if job.is_claimed else reason)
        try:
            find_image = await self._prepare_image(job, profile)
        except HostPendingError:
            await asyncio.sleep(_RESERVE_SECONDS)  # the worker answers at once, and the caller retries at once
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
        """Return how the attempt was lost if its worker was abandoned, or its job is gone and its lease has ended.

        Implements `HostAllocator.find_loss`.
        """
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
