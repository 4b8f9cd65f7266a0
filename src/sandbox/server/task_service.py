"""The task service: submission, status, cancellation and launching of tasks."""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import CancelOrder, RunnerClient, RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.store import DuplicateTaskError, Store, StoreError, TaskPage, TaskQuery
from sandbox.interfaces.tasks import (
    Cancellation,
    DrainStatus,
    Health,
    InsufficientResourcesError,
    PrunedTask,
    Retention,
    StoredArtifact,
    Submission,
    TaskFinishedError,
    TaskNotFoundError,
    UnavailableError,
)
from sandbox.interfaces.terminals import TerminalConnection, TerminalRefusedError
from sandbox.model.errors import error_reason
from sandbox.model.events import Idempotency, Record
from sandbox.model.limits import (
    LAUNCH_SHUTDOWN_SECONDS,
    MEMORY_AVAILABLE_BYTES_MIN,
    MEMORY_CHECK_SECONDS,
    RETRY_SECONDS,
)
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import WireEvent
from sandbox.server.artifact_store import ArtifactStore
from sandbox.server.cancellation import Canceller
from sandbox.server.drain import DRAINING_REASON, Drain
from sandbox.server.event_stream import EventStream
from sandbox.server.health import HealthCheck
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.maintenance.pruning import Pruner
from sandbox.server.preserved_sandboxes import DebugSessions, PreservedSandboxes
from sandbox.server.runner_launcher import RunnerLauncher
from sandbox.server.runtime_prober import RuntimeProber
from sandbox.server.scheduler import Resources, Scheduler, UnfinishedTaskLimit
from sandbox.server.submissions import SubmissionLog
from sandbox.server.tracked_task import KeyedLock, TrackedTask
from sandbox.server.watchdog import RunnerWatchdog
from sandbox.system import fair_share
from sandbox.system.log_context import bind_task

_log = logging.getLogger(__name__)
_SHUTTING_DOWN_MESSAGE = "The server is shutting down; submit the task again later."
_STARTING_STATES = frozenset({TaskState.PENDING, TaskState.STAGING, TaskState.PROVISIONING, TaskState.READY})


@dataclass(frozen=True, slots=True)
class ServiceDependencies:
    """Dependencies of the service.

    retention: the default retention of finished tasks.
    read_memory_available_bytes: memory that the host has available for new processes, None if unknown.
    """

    journals: Journals
    store: Store
    submissions: SubmissionLog
    clock: Clock
    runners: RunnerClient
    scheduler: Scheduler
    journal_tailer: JournalTailer
    prober: RuntimeProber
    runner_launcher: RunnerLauncher
    event_stream: EventStream
    artifact_store: ArtifactStore
    health_check: HealthCheck
    disk_monitor: DiskMonitor
    drain: Drain
    preserved_sandboxes: PreservedSandboxes
    debug_sessions: DebugSessions
    pruner: Pruner
    retention: Retention
    read_memory_available_bytes: Callable[[], int | None]


class TaskService:
    """Implements `interfaces.tasks.Tasks`."""

    def __init__(self, dependencies: ServiceDependencies) -> None:
        self.dependencies = dependencies
        self._launches: set[asyncio.Task[None]] = set()
        self._unfinished_task_limit = UnfinishedTaskLimit()
        self._closing = asyncio.Event()
        self._idempotency_locks = KeyedLock()
        self._next_scheduling: asyncio.TimerHandle | None = None
        self._canceller = Canceller(
            dependencies.journals, dependencies.runners, dependencies.runner_launcher, dependencies.clock
        )
        dependencies.journal_tailer.on_finished = self._on_finished
        dependencies.journal_tailer.on_writer_lost = self._on_writer_lost
        dependencies.journal_tailer.on_writer_silent = RunnerWatchdog(
            dependencies.runners, dependencies.journals, dependencies.clock
        ).check
        dependencies.disk_monitor.on_space_freed = self._schedule

    def track(self, *tracked_tasks: TrackedTask, submission: Record | None = None) -> None:
        """Start tracking tasks that are in the journal and the store. Pending tasks are queued."""
        for tracked in tracked_tasks:
            self._track_one(tracked, submission)
        self._schedule()

    def _track_one(self, tracked: TrackedTask, submission: Record | None) -> None:
        requested = Resources.requested_by(tracked.task.manifest.vm)
        self._unfinished_task_limit.add(tracked.task.id, tracked.task.manifest)
        self.dependencies.scheduler.remove(tracked.task.id)  # a pruned task may have had this id a moment ago
        if tracked.recorder is not None:
            self.dependencies.scheduler.enqueue(tracked.task.id, requested)
        else:
            self.dependencies.scheduler.reserve(tracked.task.id, requested)
        self.dependencies.journal_tailer.start(tracked, submission)

    async def close(self) -> None:
        """Stop accepting tasks, finish running launches and stop following journals. The tasks continue."""
        self._closing.set()
        if self._next_scheduling is not None:
            self._next_scheduling.cancel()
        await self._wait_for_launches()
        await self.dependencies.journal_tailer.close()
        for tracked in self.dependencies.journal_tailer.tracked_tasks.values():
            if tracked.recorder is not None:
                with contextlib.suppress(OSError):
                    tracked.recorder.writer.close()
        await asyncio.to_thread(self.dependencies.store.close)

    async def _wait_for_launches(self) -> None:
        """Wait for launches that record or start something. The others have recorded nothing yet and are cancelled."""
        if self._launches:
            await asyncio.wait(self._launches, timeout=LAUNCH_SHUTDOWN_SECONDS)
        self.dependencies.runner_launcher.cancel_secret_lookups()
        await asyncio.gather(*self._launches, return_exceptions=True)

    async def find_submission(self, idempotency: Idempotency) -> Submission | None:
        """See `Tasks.find_submission`."""
        if self._closing.is_set():
            raise UnavailableError(_SHUTTING_DOWN_MESSAGE)
        unfinished = [tracked.task for tracked in self.dependencies.journal_tailer.tracked_tasks.values()]
        try:
            previous = await asyncio.to_thread(self.dependencies.submissions.find, idempotency, unfinished)
        except StoreError as error:
            raise UnavailableError(error.message) from error
        return None if previous is None else Submission(previous, is_replayed=True)

    async def submit(self, manifest: Manifest, idempotency: Idempotency | None = None) -> Submission:
        """See `Tasks.submit`."""
        if idempotency is None:
            return Submission(await self._accept(manifest, None))
        async with self._idempotency_locks.lock_for(idempotency.key):
            previous = await self.find_submission(idempotency)
            return previous or Submission(await self._accept(manifest, idempotency))

    async def check_acceptance(self, manifest: Manifest) -> None:
        """See `Tasks.check_acceptance`."""
        self._check_acceptable(manifest)
        with self._unfinished_task_limit.reserved(manifest):
            pass
        if manifest.metadata.id:
            with contextlib.suppress(TaskNotFoundError):
                raise DuplicateTaskError(await self.status(manifest.metadata.id))

    async def _accept(self, manifest: Manifest, idempotency: Idempotency | None) -> Task:
        self._check_acceptable(manifest)
        task_id = manifest.metadata.id or str(uuid.uuid4())
        metadata = dataclasses.replace(manifest.metadata, id=task_id)
        named = dataclasses.replace(manifest, metadata=metadata)
        try:
            with self._unfinished_task_limit.reserved(named):
                tracked, submission = await asyncio.to_thread(self.dependencies.submissions.add, named, idempotency)
        except (OSError, StoreError) as error:
            raise UnavailableError(f"The task could not be stored: {error}; submit it again.") from error
        submitted = tracked.task
        _log.info("Task %s was accepted", submitted.id, extra={"task_id": submitted.id, "state": submitted.state})
        self.track(tracked, submission=submission)
        return submitted

    async def status(self, task_id: str) -> Task:
        """See `Tasks.status`."""
        tracked = self.dependencies.journal_tailer.tracked_tasks.get(task_id)
        return tracked.snapshot if tracked is not None else await self._load(task_id)

    async def query(self, query: TaskQuery) -> TaskPage:
        """See `Tasks.query`."""
        page = await fair_share.to_thread(self.dependencies.store.query, query)
        return dataclasses.replace(page, tasks=[self._with_status_message(task) for task in page.tasks])

    def _with_status_message(self, task: Task) -> Task:
        """Add the reason why a task waits, which the index does not contain."""
        tracked = self.dependencies.journal_tailer.tracked_tasks.get(task.id)
        return tracked.with_status_message(task) if tracked is not None else task

    async def release(self, task_id: str) -> None:
        """See `Tasks.release`."""
        await self.dependencies.preserved_sandboxes.release(await self.status(task_id))

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> Sequence[PrunedTask]:
        """See `Tasks.prune`."""
        try:
            return await self.dependencies.pruner.prune(retention or self.dependencies.retention, dry_run=dry_run)
        except (OSError, TimeoutError) as error:
            reason = error_reason(error)
            raise UnavailableError(f"Finished tasks could not be removed: {reason}; try again.") from error

    async def has_preserved_sandbox(self, task: Task) -> bool:
        """See `Tasks.has_preserved_sandbox`."""
        if task.state is not TaskState.FAILED_PRESERVED:
            return False
        try:
            return await fair_share.to_thread(self.dependencies.preserved_sandboxes.is_preserved, task)
        except OSError:
            return True

    async def open_terminal(self, task_id: str, order: TerminalOrder) -> TerminalConnection:
        """See `Tasks.open_terminal`."""
        task = await self.status(task_id)
        if task.state is TaskState.FAILED_PRESERVED:
            return await self.dependencies.debug_sessions.open_terminal(task, order)
        if task.state.is_final or task.attempt is None:
            raise TerminalRefusedError(f"Task {task_id} is {task.state}; only a running sandbox has terminals.")
        try:
            return await self.dependencies.runners.open_terminal(task.attempt.id, order)
        except RunnerUnreachableError as error:
            raise UnavailableError(f"The runner of task {task_id} does not respond; try again.") from error

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        """See `Tasks.wait`."""
        deadline = self.dependencies.clock.monotonic() + timeout_seconds
        tracked = self.dependencies.journal_tailer.tracked_tasks.get(task_id)
        if tracked is None:
            return await self._load(task_id)
        while not tracked.task.state.is_final and (left := deadline - self.dependencies.clock.monotonic()) > 0:
            await tracked.wait_for_change(left)
        return tracked.snapshot

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        """See `Tasks.cancel`."""
        tracked = self.dependencies.journal_tailer.tracked_tasks.get(task_id)
        previous = tracked.task if tracked is not None else await self._load(task_id)
        if previous.state.is_final:
            raise TaskFinishedError(previous)
        tracked = tracked or self.dependencies.journal_tailer.tracked_tasks.get(task_id)
        if tracked is None:
            raise UnavailableError(f"Task {task_id} is being accepted; try again.")
        message = await self._canceller.cancel(tracked, CancelOrder(reason, force))
        return Cancellation(previous, self.dependencies.clock.now(), message)

    def replay(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """See `Tasks.replay`."""
        return self.dependencies.event_stream.replay(task_id, after=after)

    def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        """See `Tasks.follow`."""
        return self.dependencies.event_stream.follow(task_id, after=after)

    def follow_all(self) -> AsyncIterator[WireEvent]:
        """See `Tasks.follow_all`."""
        return self.dependencies.event_stream.follow_all()

    async def artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        """See `Tasks.artifacts`."""
        return await fair_share.to_thread(self.dependencies.artifact_store.list_artifacts, await self.status(task_id))

    async def artifact(self, task_id: str, name: str) -> StoredArtifact:
        """See `Tasks.artifact`."""
        return await fair_share.to_thread(
            self.dependencies.artifact_store.find_artifact, await self.status(task_id), name
        )

    async def drain(self) -> DrainStatus:
        """See `Tasks.drain`."""
        await asyncio.to_thread(self.dependencies.drain.start, self.dependencies.clock.now())
        self._schedule()
        return await self.drain_status()

    async def undo_drain(self) -> DrainStatus:
        """See `Tasks.undo_drain`."""
        await asyncio.to_thread(self.dependencies.drain.undo)
        self._schedule()
        return await self.drain_status()

    async def drain_status(self) -> DrainStatus:
        """See `Tasks.drain_status`."""
        waiting = self.dependencies.scheduler.waiting_count
        unfinished = sum(
            not tracked.task.state.is_final for tracked in self.dependencies.journal_tailer.tracked_tasks.values()
        )
        return DrainStatus(self.dependencies.drain.since, max(unfinished - waiting, 0), waiting)

    async def health(self) -> Health:
        """See `Tasks.health`."""
        health = await fair_share.to_thread(self.dependencies.health_check.run)
        return dataclasses.replace(health, occupancy=self.dependencies.scheduler.occupancy)

    async def _load(self, task_id: str) -> Task:
        indexed = await fair_share.to_thread(self.dependencies.store.load, task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        return indexed.task

    def _check_acceptable(self, manifest: Manifest) -> None:
        if self._closing.is_set():
            raise UnavailableError(_SHUTTING_DOWN_MESSAGE)
        if blockers := self.dependencies.health_check.blocked_reasons:
            seconds = self.dependencies.prober.retry_after_seconds
            raise UnavailableError(" ".join(blockers), retry_after_seconds=seconds)
        if self.dependencies.drain.since is not None:
            raise UnavailableError(DRAINING_REASON)
        requested, total = Resources.requested_by(manifest.vm), self.dependencies.scheduler.total
        if not requested.fits_in(total):
            raise InsufficientResourcesError(
                requested.describe_shortfall(total, "in all"),
                requested_cpus=requested.cpus,
                available_cpus=total.cpus,
                requested_memory_bytes=requested.memory_bytes,
                available_memory_bytes=total.memory_bytes,
            )

    def _on_finished(self, tracked: TrackedTask) -> None:
        self._unfinished_task_limit.remove(tracked.task.id)
        self.dependencies.scheduler.remove(tracked.task.id)
        self._schedule()

    def _schedule(self) -> None:
        """Launch the tasks that fit. While tasks wait, run again later, because freed memory causes no event."""
        if self._next_scheduling is not None:
            self._next_scheduling.cancel()
        if self._closing.is_set() or self.dependencies.scheduler.is_queue_empty:
            return
        # Set the timer first: later errors must not stop scheduling. The empty context drops the caller's log context.
        self._next_scheduling = asyncio.get_running_loop().call_later(
            MEMORY_CHECK_SECONDS, self._schedule, context=Context()
        )
        if (reason := self._blocked_reason()) is None:
            waiting_messages = self._launch_admitted()
        else:
            waiting_messages = self.dependencies.scheduler.waiting_messages_while_blocked(reason)
        for task_id, reason in waiting_messages.items():
            self.dependencies.journal_tailer.tracked_tasks[task_id].status_message = reason

    def _blocked_reason(self) -> str | None:
        """Return why no waiting task may start, regardless of reservations."""
        if self.dependencies.drain.since is not None:
            return DRAINING_REASON
        return self.dependencies.prober.blocked_reason or self.dependencies.disk_monitor.check()

    async def _on_writer_lost(self, tracked: TrackedTask) -> None:
        """Recover a task whose journal no process holds.

        If a pending task's journal was locked at the server's start, queue the task now.
        """
        if not tracked.task.is_waiting_to_start:
            await self.dependencies.runner_launcher.recover(tracked)
        elif await self.dependencies.runner_launcher.acquire_journal(tracked):
            self.dependencies.scheduler.remove(tracked.task.id)
            self.dependencies.scheduler.enqueue(tracked.task.id, Resources.requested_by(tracked.task.manifest.vm))
            self._schedule()

    def _launch_admitted(self) -> Mapping[str, str]:
        """Launch the admitted tasks; return the reasons why the others wait."""
        available_bytes = self._memory_available_bytes()
        while (task_id := self.dependencies.scheduler.admit_next(available_bytes)) is not None:
            tracked = self.dependencies.journal_tailer.tracked_tasks[task_id]
            tracked.status_message = ""
            launch = asyncio.create_task(self._launch(tracked), name=f"launch {task_id}")
            self._launches.add(launch)
            launch.add_done_callback(self._launches.discard)
            if available_bytes is not None:
                available_bytes -= MEMORY_AVAILABLE_BYTES_MIN
        return self.dependencies.scheduler.waiting_messages(available_bytes)

    def _memory_available_bytes(self) -> int | None:
        """Return the available memory minus what starting tasks will soon use."""
        available_bytes = self.dependencies.read_memory_available_bytes()
        if available_bytes is None:
            return None
        tracked_tasks = self.dependencies.journal_tailer.tracked_tasks.values()
        starting = [
            tracked
            for tracked in tracked_tasks
            if tracked.task.state in _STARTING_STATES and self.dependencies.scheduler.has_reservation(tracked.task.id)
        ]
        return available_bytes - len(starting) * MEMORY_AVAILABLE_BYTES_MIN

    async def _launch(self, tracked: TrackedTask) -> None:
        """Retry launching until it succeeds, the task is requeued, or the server shuts down."""
        bind_task(tracked.task.id)
        while not self._closing.is_set():
            if (
                tracked.recorder is not None
                and tracked.recorder.task.is_waiting_to_start
                and self._blocked_reason() is not None
            ):
                self.dependencies.scheduler.requeue(tracked.task.id)
                self._schedule()
                return
            try:
                await self.dependencies.runner_launcher.launch(tracked)
                return
            except Exception as error:
                tracked.report_error(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), RETRY_SECONDS)
