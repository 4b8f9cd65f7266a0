"""Runs attempts on workers that an engine starts.

Runners, terminals, preserved disks and files on the hosts of workers are reached through handles, which send requests
to the workers.
"""

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sandbox.interfaces.cluster_engine import Engine, WorkerVerifier
from sandbox.interfaces.images import ImageSource
from sandbox.interfaces.journal import JournalBusyError, JournalWriter, LockState, TaskReplicas
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError, Leftover, LeftoverScan
from sandbox.interfaces.runner import (
    CancelAttempt,
    ClientFrame,
    FinishAttempt,
    OpenTerminal,
    Reply,
    RunAttempt,
    RunDebugSession,
    RunnerFrame,
    RunnerNotStartedError,
    TerminalConnection,
)
from sandbox.interfaces.worker_messages import (
    RECORD_BATCH_BYTES,
    SERVER_RECORD_BYTES_MAX,
    HasDisk,
    HasDiskOrHandle,
    HasSameSecrets,
    HasSandboxHandle,
    IsResponsive,
    KillRunner,
    Launch,
    LockDisk,
    ReadEndOffset,
    ReceiveRecords,
    RemoveDisk,
    Request,
    StartDebugSession,
    UnlockDisk,
)
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS, SANDBOX_TEARDOWN_SECONDS
from sandbox.model.resources import Resources
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.hosts import (
    AnyClusterHost,
    ClusterAllocator,
    ClusterHosts,
    EngineHosts,
    SeenHosts,
    load_largest_host_sizes,
)
from sandbox.placements.cluster.job_state import Job, JobStore
from sandbox.placements.cluster.jobs import Jobs, JobSettings
from sandbox.placements.cluster.worker_authorization import ClaimChecker, ClusterKey, FindCloneCredentials
from sandbox.placements.cluster.worker_server import SaveRunnerLog, WorkerRequestSources, WorkerServer
from sandbox.placements.cluster.worker_session import (
    WORKER_LAUNCH_TIMEOUT_SECONDS,
    LoopThread,
    WorkerClient,
    WorkerSession,
)
from sandbox.placements.runner_client import RunnerClient
from sandbox.primitives.message_stream import InvalidMessageError

_MARGIN_SECONDS = 2.0
_lock_ids = itertools.count(1)


class RemoteRunnerHandle:
    """Implements `interfaces.runner.RunnerHandle`: the worker connects each stream to the runner's socket."""

    def __init__(self, workers: WorkerClient, location: AttemptLocation) -> None:
        self.attempt_id = location.attempt_id
        self._workers = workers
        self._location = location
        self._client = RunnerClient(partial(workers.open_stream, location))

    def lock_state(self) -> LockState:
        """Implements `RunnerHandle.lock_state`."""
        return self._workers.jobs.lock_state(self._location.task_id)

    async def may_be_responsive(self) -> bool:
        """Have the worker ping the runner; True if the host is silent. Implements `RunnerHandle.may_be_responsive`."""
        request, timeout_seconds = IsResponsive(self.attempt_id), CONTROL_REQUEST_TIMEOUT_SECONDS + _MARGIN_SECONDS
        try:
            return bool(await self._workers.request(self._location, request, bool, timeout_seconds))
        except OSError:
            return True

    async def cancel(self, request: CancelAttempt) -> Reply:
        """Implements `RunnerHandle.cancel`."""
        return await self._workers.thread.run(self._client.cancel(request))

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Implements `RunnerHandle.open_terminal`."""
        thread = self._workers.thread
        return LoopThreadTerminal(await thread.run(self._client.open_terminal(request)), thread)

    async def kill(self) -> bool:
        """Implements `RunnerHandle.kill`. A worker that was abandoned, or that never started, has no runner."""
        job = self._workers.jobs.of_task(self._location.task_id)
        if job is None or job.stored.is_abandoned or not job.is_claimed:
            return False
        location = self._location._replace(attempt_id=job.stored.attempt_ids[-1])
        return bool(await self._workers.request(location, KillRunner(), bool))


class RemotePreservedDisk:
    """Implements `interfaces.placement.PreservedDisk`: the worker holds the lock until its session ends."""

    def __init__(self, workers: WorkerClient, location: AttemptLocation) -> None:
        self._workers = workers
        self._location = location
        self._client = RunnerClient(partial(workers.open_stream, location))
        self._lock_id = 0

    @contextlib.asynccontextmanager
    async def try_lock(self) -> AsyncIterator[LockState]:
        """Implements `PreservedDisk.try_lock`."""
        lock_id, lock_state = next(_lock_ids), LockState.UNKNOWN
        try:
            lock_state = await self._lock(lock_id)
            self._lock_id = lock_id
            yield lock_state
        finally:
            self._lock_id = 0
            await self._unlock(lock_id, lock_state)

    async def _lock(self, lock_id: int) -> LockState:
        request = LockDisk(lock_id, self._location.attempt_id)
        try:
            return LockState.FREE if await self._request(request, str) == "free" else LockState.HELD
        except HostUnreachableError:
            return LockState.UNKNOWN

    async def _unlock(self, lock_id: int, lock_state: LockState) -> None:
        """Release the lock, even if the worker has not acquired it yet."""
        if lock_state is LockState.HELD:
            return
        request = UnlockDisk(lock_id)
        try:
            if lock_state is LockState.FREE:
                await self._request(request, None)
                return
        except asyncio.CancelledError:
            self._workers.post(self._location, request)
            raise
        except HostUnreachableError:
            pass
        self._workers.post(self._location, request)

    async def start_debug_session(self, order: RunDebugSession) -> None:
        """Implements `PreservedDisk.start_debug_session`."""
        await self._request(StartDebugSession(self._lock_id, order), None, WORKER_LAUNCH_TIMEOUT_SECONDS)

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Implements `PreservedDisk.open_terminal`."""
        thread = self._workers.thread
        return LoopThreadTerminal(await thread.run(self._client.open_terminal(request)), thread)

    async def remove(self) -> None:
        """Implements `PreservedDisk.remove`."""
        await self._request(RemoveDisk(self._lock_id), None, SANDBOX_TEARDOWN_SECONDS)

    async def _request(
        self, request: Request, result_type: Any, timeout_seconds: float = CONTROL_REQUEST_TIMEOUT_SECONDS
    ) -> Any:
        return await self._workers.request(self._location, request, result_type, timeout_seconds)


class ClusterFiles:
    """Implements `interfaces.placement.AttemptFiles`. Workers remove the leftovers on their hosts themselves."""

    def __init__(self, workers: WorkerClient) -> None:
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
        if not self._workers.may_have_files(location):
            return False
        return bool(self._workers.request_blocking(location, request, bool))


class LoopThreadTerminal:
    """Implements `interfaces.runner.TerminalConnection` for a connection in the event loop's thread."""

    def __init__(self, inner: TerminalConnection, thread: LoopThread) -> None:
        self._inner = inner
        self._thread = thread

    async def read(self) -> RunnerFrame:
        """Implements `TerminalConnection.read`."""
        return await self._thread.run(self._inner.read())

    async def send(self, frame: ClientFrame) -> None:
        """Implements `TerminalConnection.send`."""
        await self._thread.run(self._inner.send(frame))

    async def close(self) -> None:
        """Implements `TerminalConnection.close`."""
        await self._thread.run(self._inner.close())


_log = logging.getLogger(__name__)

_COPY_SECONDS = 20.0
"""Time limit for sending the records before a launch, because the caller holds a slot that other tasks need."""

_RELEASE_SECONDS, _RELEASE_SECONDS_MAX = 1.0, 60.0


class ClusterPlacement:
    """Implements `interfaces.placement.Placement`.

    maximal_host_sizes: the resources for tasks on each of the largest hosts.
    """

    def __init__(
        self,
        workers: WorkerClient,
        hosts: ClusterHosts,
        images: ImageSource,
        maximal_host_sizes: Sequence[Resources],
        storage: "ServerTaskStorage",
    ) -> None:
        largest = max(maximal_host_sizes, key=lambda each: (each.memory_bytes, each.cpus, each.disk_bytes))
        self.host = AnyClusterHost(largest, images)
        self.files = ClusterFiles(workers)
        self.allocator = ClusterAllocator(workers, hosts, images, maximal_host_sizes)
        self._workers = workers
        self._replicas = storage.replicas
        self._has_task_ended = storage.has_task_ended

    async def run(self) -> None:
        """Release the workers of tasks that ended while no server was running; end the thread on cancellation."""
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
                await session.launch(Launch(order), WORKER_LAUNCH_TIMEOUT_SECONDS)
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


class WorkerListenerSettings(NamedTuple):
    """The address for workers, the server's certificate, and how workers prove their claims; see `ClaimChecker`."""

    host: str
    port: int
    tls: ssl.SSLContext
    proof_method: ClusterKey | WorkerVerifier | None = None


class ServerTaskStorage(NamedTuple):
    """The server's storage for the files of tasks.

    replicas: the copies of journals and artifacts. save_runner_log: see `SaveRunnerLog`.
    has_task_ended: returns whether a task has ended or is gone. Blocks.
    """

    replicas: TaskReplicas
    save_runner_log: SaveRunnerLog
    has_task_ended: Callable[[str], bool]


async def create_cluster_placement(
    directory: Path,
    engine: Engine,
    settings: JobSettings,
    listener: WorkerListenerSettings,
    storage: ServerTaskStorage,
    images: ImageSource,
    find_credentials: FindCloneCredentials,
) -> ClusterPlacement:
    """Load the jobs, listen for workers and start the thread. Raises OSError, SandboxError.

    directory: where the jobs are stored.
    """
    hosts = await load_largest_host_sizes(engine, directory.with_name("largest-hosts.json"))
    maximal_host_sizes = [
        msgspec.structs.replace(host, memory_bytes=host.memory_bytes - settings.overhead_bytes) for host in hosts
    ]
    seen_hosts, drains = SeenHosts(directory.with_name("hosts.json")), HostDrains(directory.with_name("drained.json"))
    thread, engine_hosts = LoopThread(), EngineHosts(engine)

    async def start() -> Jobs:
        jobs = Jobs(JobStore(directory), engine, settings, drains)
        server = WorkerServer(
            ClaimChecker(jobs, drains, listener.proof_method),
            seen_hosts,
            storage.replicas,
            storage.save_runner_log,
            storage.has_task_ended,
            WorkerRequestSources(find_credentials, images),
            listener.tls,
        )
        await server.listen(listener.host, listener.port)
        jobs.start()
        seen_hosts.start()
        engine_hosts.start()
        return jobs

    try:
        jobs = await thread.run(start())
        cluster_hosts = ClusterHosts(seen_hosts, engine_hosts, drains, jobs)
        return ClusterPlacement(WorkerClient(jobs, thread), cluster_hosts, images, maximal_host_sizes, storage)
    except BaseException:
        await asyncio.to_thread(thread.close)
        raise
