"""Carries out the server's requests about a task on the worker's host.

`WorkerTask` does this for the worker's own task. `RunnerCredentialRequests` reads the requests for git credentials that
the task's runners send. `OtherTaskLeftovers` removes the files that killed workers of other tasks left on this host.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.images import Image
from sandbox.interfaces.journal import JournalDamagedError, Journals, LockState, RecordBatch, TaskReplicas
from sandbox.interfaces.placement import AttemptFiles, AttemptLocation, Placement, PreservedDisk
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunDebugSession
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.interfaces.worker_messages import (
    FindImage,
    HasDisk,
    HasDiskOrHandle,
    HasSameSecrets,
    HasSandboxHandle,
    ImagePreparationStatus,
    IsResponsive,
    KillRunner,
    Launch,
    LockDisk,
    PrepareImage,
    ReadEndOffset,
    ReceiveRecords,
    RemoveDisk,
    Request,
    StartDebugSession,
    UnlockDisk,
)
from sandbox.interfaces.workspace import (
    CREDENTIAL_ANSWER_SECONDS,
    CREDENTIAL_MESSAGE_BYTES_MAX,
    CredentialAnswer,
    CredentialRequest,
)
from sandbox.model.errors import DECODE_ERRORS, SandboxError, error_reason
from sandbox.model.events import AgentStarted
from sandbox.model.fixed_limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.model.task_state import TaskState
from sandbox.primitives.concurrency import wait_readable
from sandbox.primitives.message_stream import StreamPair
from sandbox.worker.task_image import OpenImage, TaskImage

_log = logging.getLogger(__name__)


class RunnerCredentialRequests:
    """Reads the requests from a socket pair whose other end all runners of this worker inherit."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._request: CredentialRequest | None = None
        self._received_at = 0.0

    async def serve(self, ask_server: Callable[[CredentialRequest], Awaitable[CredentialAnswer]]) -> None:
        """Serve requests until cancelled, or until `ask_server` raises an error.

        The next call continues with a request that was not answered.
        """
        while True:
            if self._request is None:
                await wait_readable(self._connection)
                # No await may follow the read, because a cancellation would lose the request.
                self._request, self._received_at = self._read(), time.monotonic()
                continue
            if time.monotonic() - self._received_at < CREDENTIAL_ANSWER_SECONDS:  # else the runner has stopped waiting
                answer = await ask_server(self._request)
                with contextlib.suppress(BlockingIOError):  # no runner reads the answers
                    self._connection.send(msgspec.msgpack.encode(answer))
            self._request = None

    def _read(self) -> CredentialRequest | None:
        """Read the next request; return None if it is not valid."""
        try:
            return msgspec.msgpack.decode(self._connection.recv(CREDENTIAL_MESSAGE_BYTES_MAX), type=CredentialRequest)
        except BlockingIOError:
            pass
        except DECODE_ERRORS as error:
            _log.warning("A request for credentials is not valid: %s", error_reason(error))
        return None


async def remove_tasks(layouts: Sequence[TaskLayout], files: AttemptFiles, remove: RemovePaths) -> None:
    """Remove everything of these tasks from this host. No task may have a runner. Raises OSError, SandboxError."""
    task_ids = {layout.task_id for layout in layouts}
    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):  # a program in a sandbox can delay the search
        leftovers = (await files.scan()).leftovers
    for leftover in leftovers:
        if leftover.location.task_id in task_ids:
            async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                await files.clean_up(leftover, keeps_disk=False)
    await remove([layout.root for layout in layouts if layout.root.exists()])


PERMANENT_AFTER_SECONDS = 120.0
"""How long errors of this host's own files may last before the worker gives up."""

_RELATED_ERRORS_SECONDS_MAX = 600.0
"""Time between two errors beyond which they count as unrelated."""

_POLL_SECONDS = 0.1


class RunnerSockets(Protocol):
    """The sockets of the runners on this host.

    credential_requests: the requests of the runners for git credentials.
    """

    credential_requests: RunnerCredentialRequests

    async def renew_lease(self, attempt_id: str, deadline: float) -> None:
        """Extend the lease of an attempt's runner. Raises SandboxError."""
        ...

    async def connect(self, attempt_id: str) -> StreamPair:
        """Open a stream to the control socket of an attempt's runner. Raises OSError."""
        ...


class HostFilesError(Exception):
    """This host's own files cannot be used: the disk is full or damaged, or the task's files are damaged."""


class HostFailures:
    """The errors of this host's own files since the last success."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._last_at = 0.0

    @property
    def are_permanent(self) -> bool:
        """Whether the errors have been repeated for so long that another host should run the task."""
        return self._first_at is not None and self._last_at - self._first_at >= PERMANENT_AFTER_SECONDS

    def record(self, error: Exception) -> None:
        """Record an error."""
        now = time.monotonic()
        if self._first_at is None or now - self._last_at > _RELATED_ERRORS_SECONDS_MAX:
            self._first_at = now
        self._last_at = now
        _log.warning("The files of this host cannot be used: %s", error_reason(error))

    def clear(self) -> None:
        """Record a success."""
        self._first_at = None


class WorkerTask:
    """The worker's task on this host.

    launches: the number of launches that have begun.
    has_task_ended: the server needs no other attempt of the task on this host.
    failures: the errors of this host's own files.
    credential_requests: the requests of the runners for git credentials.
    """

    def __init__(
        self,
        layout: TaskLayout,
        placement: Placement,
        image: TaskImage,
        journals: Journals,
        replicas: TaskReplicas,
        sockets: RunnerSockets,
        remove: RemovePaths,
    ) -> None:
        """layout: the task's files on this host.

        placement: starts runners on this host. image: the image of their sandboxes.
        """
        self.task_id = layout.task_id
        self.layout = layout
        self.journals = journals
        self.replicas = replicas
        self._placement = placement
        self._image = image
        self._sockets = sockets
        self.credential_requests = sockets.credential_requests
        self._remove = remove
        self.launches = 0
        self.has_task_ended = False
        self.failures = HostFailures()
        self._launching_count = 0
        self._launching: set[asyncio.Task[int]] = set()
        self._attempt_id = ""
        self._agent_start_end: int | None = None
        """The end of a batch with the record of the running agent's start; None if its runner has not recorded it."""
        self._disks: dict[int, tuple[contextlib.AsyncExitStack, PreservedDisk]] = {}
        self._requested_locks: set[int] = set()
        """The locks that are being acquired."""

    @property
    def is_launching(self) -> bool:
        """Whether a launch is running."""
        return self._launching_count > 0

    def lock_state(self) -> LockState:
        """Return whether a runner holds the journal's lock. Raises OSError."""
        return self.journals.lock_state(self.task_id)

    def check_image(self, request: Request) -> None:
        """Check that a request names only an image that was prepared for the task. Raises InvalidMessageError."""
        match request:
            case (
                Launch(order=RunAttempt(image=Image() as image))
                | StartDebugSession(order=RunDebugSession(image=Image() as image))
            ):
                self._image.check(image)

    async def carry_out(self, request: Request) -> Any:
        """Carry out a request, and return its result. Raises OSError, SandboxError."""
        match request:
            case ReceiveRecords() | ReadEndOffset() | Launch():
                return await self._prepare_or_launch(request)
            case IsResponsive():
                return await self._placement.find_runner(self._attempt_location(request.attempt_id)).may_be_responsive()
            case KillRunner():
                return await self.kill_runner()
            case FindImage():
                return self._image.find(request.profile)
            case LockDisk() | StartDebugSession() | RemoveDisk() | UnlockDisk():
                return await self._use_disk(request)
            case _:
                return await asyncio.to_thread(self._check_files, request)

    async def prepare_image(self, request: PrepareImage, open_image: OpenImage) -> ImagePreparationStatus:
        """Carry out a request for an image; see `TaskImage.prepare`. Record an error of this host's files."""
        try:
            return await self._image.prepare(request, open_image)
        except OSError as error:
            self.failures.record(error)
            raise

    def mark_task_ended(self) -> None:
        """Record that the server has the task's last record, or that the server has ended the task."""
        self.has_task_ended = True

    async def kill_runner(self) -> bool:
        """Kill the runner that holds the journal's lock. Raises OSError."""
        return await self._placement.find_runner(self._attempt_location(self._attempt_id)).kill()

    async def wait_until_no_runner(self) -> None:
        """Wait until no runner holds the journal's lock. Raises OSError."""
        while True:
            if self.lock_state() is LockState.FREE:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def note_agent_start(self, batch: RecordBatch) -> None:
        """Record whether the agent has started, before the records are sent to the server."""
        if any(isinstance(record.event, AgentStarted) for record in batch.records):
            self._agent_start_end = batch.next_offset

    def may_communicate(self, copied_end_offset: int) -> bool:
        """Return whether the server has the record of the running agent's start.

        Otherwise, the server would start another agent if this host were lost now.
        """
        return self._agent_start_end is not None and copied_end_offset >= self._agent_start_end

    async def renew_lease(self, deadline: float) -> None:
        """Extend the lease of the running attempt. Raises SandboxError."""
        if self._attempt_id:
            await self._sockets.renew_lease(self._attempt_id, deadline)

    async def connect(self, attempt_id: str) -> StreamPair:
        """Open a stream to the control socket of an attempt. Raises OSError."""
        return await self._sockets.connect(attempt_id)

    async def unlock_disks(self) -> None:
        """Release the disk locks that the ended session held."""
        for lock_id in list(self._disks):
            await self._unlock(lock_id)

    async def is_done(self) -> bool:
        """Return whether nothing of the ended task is needed on this host any longer. Raises OSError."""
        if self.lock_state() is not LockState.FREE or self.is_launching or self._disks:
            return False
        return not await asyncio.to_thread(self._keeps_sandbox)

    async def clean_up(self) -> None:
        """Remove everything of the task from this host.

        Call this only while no runner is running. Raises OSError, SandboxError.
        """
        await remove_tasks([self.layout], self._placement.files, self._remove)

    def _attempt_location(self, attempt_id: str) -> AttemptLocation:
        return AttemptLocation(self.task_id, attempt_id, "")

    async def _prepare_or_launch(self, request: ReceiveRecords | ReadEndOffset | Launch) -> int:
        """Carry out a step of a launch. Record an error of this host's files; a successful launch clears the errors."""
        try:
            match request:
                case ReceiveRecords():
                    return await asyncio.to_thread(self.replicas.receive, self.task_id, request.offset, request.data)
                case ReadEndOffset():
                    return await asyncio.to_thread(self.replicas.end_offset, self.task_id)
                case Launch():
                    launches = await self._launch(request.order)
        except (OSError, JournalDamagedError) as error:
            self.failures.record(error)
            raise
        self.failures.clear()
        return launches

    async def _launch(self, order: RunAttempt | FinishAttempt) -> int:
        if order.task_id != self.task_id:
            raise OSError(f"This worker runs the task {self.task_id}.")
        # The end of the session must not interrupt the launch, because the open journal would stay locked.
        launching = asyncio.create_task(self._launch_uninterrupted(order))
        self._launching.add(launching)
        launching.add_done_callback(self._end_launch)
        return await asyncio.shield(launching)

    def _end_launch(self, launching: "asyncio.Task[int]") -> None:
        self._launching.discard(launching)
        if not launching.cancelled():
            launching.exception()  # retrieved, in case the session has ended

    async def _launch_uninterrupted(self, order: RunAttempt | FinishAttempt) -> int:
        self.launches += 1
        launches = self.launches
        self._launching_count += 1
        try:
            writer = await asyncio.to_thread(self.journals.open, self.task_id)
            self._attempt_id, self._agent_start_end = order.attempt_id, None
            try:
                await self._placement.launch(order, writer)
            finally:
                writer.close()
        finally:
            self._launching_count -= 1
        return launches

    async def _use_disk(self, request: LockDisk | StartDebugSession | RemoveDisk | UnlockDisk) -> str | None:
        match request:
            case LockDisk():
                return await self._lock(request)
            case StartDebugSession():
                await self._locked_disk(request.lock_id).start_debug_session(request.order)
            case RemoveDisk():
                await self._locked_disk(request.lock_id).remove()
            case UnlockDisk():
                await self._unlock(request.lock_id)
        return None

    def _locked_disk(self, lock_id: int) -> PreservedDisk:
        if lock_id not in self._disks:
            raise OSError("The lock of the disk was released when the connection to the server broke; try again.")
        return self._disks[lock_id][1]

    async def _lock(self, request: LockDisk) -> str:
        disk, stack = (
            self._placement.preserved_disk(self._attempt_location(request.attempt_id)),
            contextlib.AsyncExitStack(),
        )
        self._requested_locks.add(request.lock_id)
        try:
            lock_state = await stack.enter_async_context(disk.try_lock())
        finally:
            is_requested = request.lock_id in self._requested_locks
            self._requested_locks.discard(request.lock_id)
        if lock_state is not LockState.FREE or not is_requested:
            await stack.aclose()
            return "held"
        self._disks[request.lock_id] = stack, disk
        return "free"

    async def _unlock(self, lock_id: int) -> None:
        """Release a lock, even if it is still being acquired, because the server may have stopped waiting for it."""
        self._requested_locks.discard(lock_id)
        if lock_id in self._disks:
            await self._disks.pop(lock_id)[0].aclose()

    def _check_files(self, request: Request) -> bool:
        files = self._placement.files
        match request:
            case HasDisk():
                return files.has_disk(self._attempt_location(request.attempt_id))
            case HasDiskOrHandle():
                return files.has_disk_or_handle(self._attempt_location(request.attempt_id))
            case HasSameSecrets():
                return files.has_same_secrets(self._attempt_location(request.attempt_id), request.secrets)
            case HasSandboxHandle():
                return files.has_sandbox_handle(self.task_id)
        raise SandboxError(f"This worker does not support {type(request).__name__}.")

    def _keeps_sandbox(self) -> bool:
        """Return whether the task preserves a sandbox on this host."""
        try:
            task = self.journals.replay(self.task_id).task
        except (FileNotFoundError, JournalDamagedError):
            return False
        if task is None or task.state is not TaskState.FAILED_PRESERVED:
            return False
        attempts = (*task.past_attempts, *((task.attempt,) if task.attempt is not None else ()))
        return any(self._placement.files.has_disk_or_handle(self._attempt_location(attempt.id)) for attempt in attempts)


class OtherTaskLeftovers:
    """The files that were left on this host by killed workers of other tasks."""

    def __init__(
        self,
        data_dir: Path,
        files: AttemptFiles,
        journals: Journals,
        lock_task: Callable[[str], contextlib.AbstractContextManager[None]],
        remove: RemovePaths,
    ) -> None:
        """lock_task: locks a task on this host; raises OSError immediately if a worker holds the lock."""
        self._data_dir = data_dir
        self._files = files
        self._journals = journals
        self._lock_task = lock_task
        self._remove = remove

    def find(self, own_task_id: str) -> Sequence[str]:
        """Return the other tasks with files on this host, including those that have a worker. Raises OSError."""
        directory = TaskLayout(self._data_dir, own_task_id).root.parent
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
        return sorted(name for name in names - {own_task_id} if is_task_id(name))

    async def remove(self, task_ids: Collection[str]) -> None:
        """Remove tasks that have ended, except those that a worker or a runner still uses.

        A worker keeps the lock of its task while a sandbox is preserved. Raises OSError, SandboxError.
        """
        with contextlib.ExitStack() as locks:
            unused = []
            for task_id in task_ids:
                try:
                    locks.enter_context(self._lock_task(task_id))
                    is_unused = self._journals.lock_state(task_id) is LockState.FREE
                except OSError:
                    is_unused = False
                if is_unused:
                    unused.append(TaskLayout(self._data_dir, task_id))
            if unused:
                _log.info("Removing the files of ended tasks: %s", ", ".join(layout.task_id for layout in unused))
                await remove_tasks(unused, self._files, self._remove)
