"""The dispatcher: queues unfinished tasks, and launches those that fit, unless the server is being drained."""

import asyncio
import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import Context

from sandbox.interfaces.placement import HostPendingError
from sandbox.interfaces.server_services import InsufficientResourcesError, Occupancy
from sandbox.model.failure import FailureCode
from sandbox.model.fixed_limits import (
    HOST_ERROR_PAUSE_SECONDS,
    MEMORY_AVAILABLE_BYTES_MIN,
    MEMORY_CHECK_INTERVAL_SECONDS,
    SHUTDOWN_LAUNCH_WAIT_SECONDS,
)
from sandbox.model.manifest.schema import Manifest
from sandbox.model.resources import Resources
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.primitives.log_context import bind_task
from sandbox.server.placements import ProbedHost
from sandbox.server.runner_launcher import RunnerLauncher
from sandbox.server.scheduler import Scheduler
from sandbox.server.start_conditions import StartConditions, UnfinishedTaskLimit
from sandbox.server.tracked_task import ServerOwned, TrackedTask, TrackedTasks

_PROVISION_FAILURES = frozenset({FailureCode.PROVISION_FAILED, FailureCode.PROVISION_TIMEOUT})
_STARTING_STATES = frozenset({TaskState.PENDING, TaskState.STAGING, TaskState.PROVISIONING, TaskState.READY})


_FEW_WAITING_TASKS = 50
_PAUSE_FACTOR = 10
"""With more than _FEW_WAITING_TASKS, the pause after a dispatch is this multiple of the dispatch's duration.

The pause is at most MEMORY_CHECK_INTERVAL_SECONDS.
"""


class Dispatcher:
    """Launches waiting tasks as the `Scheduler` admits them, and keeps their reservations of the server's capacity.

    tracked_tasks: must contain every added task at the next `dispatch`.
    host: the host that runs new attempts.
    """

    def __init__(
        self,
        tracked_tasks: TrackedTasks,
        scheduler: Scheduler,
        runner_launcher: RunnerLauncher,
        conditions: StartConditions,
        host: ProbedHost,
        unfinished_task_limit: UnfinishedTaskLimit,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._scheduler = scheduler
        self._runner_launcher = runner_launcher
        self._conditions = conditions
        self._host = host
        self._unfinished_task_limit = unfinished_task_limit
        self._launches: set[asyncio.Task[None]] = set()
        self._next_dispatch: asyncio.TimerHandle | None = None
        self._paused_until = 0.0
        """The earliest time of the next dispatch of many tasks, on the clock of the event loop."""

        self._closing = asyncio.Event()

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called. If so, tasks are no longer launched, so none may be accepted."""
        return self._closing.is_set()

    @property
    def waiting_count(self) -> int:
        """Number of tasks that are waiting to be launched."""
        return self._scheduler.waiting_count

    @property
    def occupancy(self) -> Occupancy:
        """The server's capacity, and the reserved part of it."""
        return self._scheduler.occupancy

    def check_capacity(self, manifest: Manifest) -> None:
        """Raise InsufficientResourcesError if no host for new attempts has enough resources in total for the task."""
        requested = Resources.requested_by(manifest.vm)
        total = self._scheduler.closest_host_capacity(requested)
        if not requested.fits_in(total):
            raise InsufficientResourcesError(
                requested.describe_shortfall(total, "in all"),
                requested_cpus=requested.cpus,
                available_cpus=total.cpus,
                requested_memory_bytes=requested.memory_bytes,
                available_memory_bytes=total.memory_bytes,
                is_cluster=self._scheduler.has_engine,
            )

    def reserved_unfinished_task_slot(self, manifest: Manifest) -> AbstractContextManager[None]:
        """Reserve a slot for a task that is being accepted. Raises UnavailableError if there are too many tasks."""
        return self._unfinished_task_limit.reserved(manifest)

    def add(self, tracked: TrackedTask) -> None:
        """Queue a task that is waiting to be launched, or reserve the resources of a task that was already launched."""
        task = tracked.task
        self._unfinished_task_limit.add(task.id, task.manifest)
        if isinstance(tracked.owner, ServerOwned):
            self._enqueue(task)
        else:
            self._scheduler.remove(task.id)
            self._scheduler.reserve(task.id, Resources.requested_by(task.manifest.vm))

    def finish(self, tracked: TrackedTask) -> None:
        """Free the resources of a task that has ended, and launch the next tasks.

        If no sandbox could be created for the task, the runtime is probed again.
        """
        if tracked.task.failure is not None and tracked.task.failure.code in _PROVISION_FAILURES:
            self._host.request_probe()
        self._unfinished_task_limit.remove(tracked.task.id)
        self._scheduler.remove(tracked.task.id)
        self.dispatch()

    def enqueue_recovered(self, tracked: TrackedTask) -> None:
        """Queue a task whose journal was in use at the server's start, which is why `add` did not queue it."""
        self._enqueue(tracked.task)
        self.dispatch()

    def dispatch(self) -> None:
        """Launch the tasks that fit. While tasks are waiting, run again later, because freed memory causes no event.

        With many waiting tasks, this takes milliseconds. It then pauses before it runs again, because every submission
        calls this method.
        """
        if self._next_dispatch is not None:
            self._next_dispatch.cancel()
        if self._closing.is_set() or self._scheduler.is_queue_empty:
            return
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        is_paused = self._scheduler.waiting_count > _FEW_WAITING_TASKS and started_at < self._paused_until
        pause_seconds = self._paused_until - started_at if is_paused else MEMORY_CHECK_INTERVAL_SECONDS
        # Set the timer first: later errors must not stop the dispatcher. The empty context drops the caller's log
        # context.
        self._next_dispatch = loop.call_later(pause_seconds, self.dispatch, context=Context())
        if is_paused:
            return
        if (reason := self._blocked_reason()) is None:
            waiting_messages = self._launch_admitted()
        else:
            waiting_messages = self._scheduler.waiting_messages_while_blocked(reason)
        for task_id, reason in waiting_messages.items():
            self._tracked_tasks[task_id].status_message = reason
        now = loop.time()
        self._paused_until = now + min(_PAUSE_FACTOR * (now - started_at), MEMORY_CHECK_INTERVAL_SECONDS)

    async def close(self) -> None:
        """Stop launching tasks. Wait up to SHUTDOWN_LAUNCH_WAIT_SECONDS for the running launches.

        Then cancel launches that are still waiting for secrets; they have recorded nothing yet.
        """
        self._closing.set()
        if self._next_dispatch is not None:
            self._next_dispatch.cancel()
        if self._launches:
            await asyncio.wait(self._launches, timeout=SHUTDOWN_LAUNCH_WAIT_SECONDS)
        self._runner_launcher.cancel_secret_lookups()
        await asyncio.gather(*self._launches, return_exceptions=True)

    def _enqueue(self, task: Task) -> None:
        self._scheduler.remove(task.id)  # a pruned task may have had this id a moment ago
        requested, reason = Resources.requested_by(task.manifest.vm), self._conditions.missing_key_reason(task.manifest)
        self._scheduler.enqueue(task.id, requested, reason)

    def _blocked_reason(self) -> str | None:
        """Return why no waiting task may start, regardless of reservations."""
        return next(self._conditions.blocking_reasons(), None)

    def _launch_admitted(self) -> Mapping[str, str]:
        """Launch the admitted tasks; return the reasons why the others are waiting."""
        available_bytes = self._memory_available_bytes()
        while (task_id := self._scheduler.admit_next(available_bytes)) is not None:
            tracked = self._tracked_tasks[task_id]
            tracked.status_message = ""
            launch = asyncio.create_task(self._launch(tracked), name=f"launch {task_id}")
            self._launches.add(launch)
            launch.add_done_callback(self._launches.discard)
            if available_bytes is not None:
                available_bytes -= MEMORY_AVAILABLE_BYTES_MIN
        return self._scheduler.waiting_messages(available_bytes)

    def _memory_available_bytes(self) -> int | None:
        """Return the available memory, minus the memory that tasks being started will soon use."""
        available_bytes = self._host.memory_available_bytes()
        if available_bytes is None:
            return None
        starting = [
            tracked
            for tracked in self._tracked_tasks.values()
            if tracked.task.state in _STARTING_STATES and self._scheduler.has_reservation(tracked.task.id)
        ]
        return available_bytes - len(starting) * MEMORY_AVAILABLE_BYTES_MIN

    async def _launch(self, tracked: TrackedTask) -> None:
        """Retry launching until it succeeds, the task is requeued, or the server shuts down."""
        bind_task(tracked.task.id)
        while not self._closing.is_set():
            if (
                isinstance(tracked.owner, ServerOwned)
                and tracked.owner.recorder.task.is_waiting_to_start
                and self._blocked_reason() is not None
            ):
                self._scheduler.requeue(tracked.task.id)
                self.dispatch()
                return
            try:
                await self._runner_launcher.launch(tracked)
                return
            except HostPendingError as error:
                tracked.status_message = f"Waiting for a host: {error.message}"
                continue
            except Exception as error:
                tracked.report_error(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), HOST_ERROR_PAUSE_SECONDS)
