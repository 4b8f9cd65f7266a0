"""Runners, terminals, preserved disks and files of attempts on the hosts of workers, as the server uses them."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError, Leftover, LeftoverScan
from sandbox.interfaces.runner import CancelAttempt, OpenTerminal, Reply, RunDebugSession
from sandbox.interfaces.terminal_frames import ClientFrame, RunnerFrame, TerminalConnection
from sandbox.interfaces.worker_messages import (
    HasDisk,
    HasDiskOrHandle,
    HasSameSecrets,
    HasSandboxHandle,
    IsResponsive,
    KillRunner,
    LockDisk,
    RemoveDisk,
    Request,
    StartDebugSession,
    UnlockDisk,
)
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS, SANDBOX_TEARDOWN_SECONDS
from sandbox.placements.cluster.event_loop_thread import LoopThread
from sandbox.placements.cluster.requests_to_workers import LAUNCH_SECONDS, WorkerClient
from sandbox.placements.runner_client import RunnerClient

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

    async def is_responsive(self) -> bool:
        """Have the worker ping the runner; True if the host is silent. Implements `RunnerHandle.is_responsive`."""
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
        await self._request(StartDebugSession(self._lock_id, order), None, LAUNCH_SECONDS)

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
        if not self._workers.has_files(location):
            return False
        return bool(self._workers.request_blocking(location, request, bool))


class LoopThreadTerminal:
    """Implements `interfaces.terminal_frames.TerminalConnection` for a connection in the event loop's thread."""

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
