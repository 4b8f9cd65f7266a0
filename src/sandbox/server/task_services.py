"""Services for existing tasks, used by the API and the dashboard: status, cancellation, artifacts and terminals.

A cancel request is delivered to the holder of the task's journal: the server or a runner, if there is one.
"""

import asyncio
import contextlib
import dataclasses
import errno
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals, LockState, Recorder
from sandbox.interfaces.placement import CANCEL_TOO_LATE
from sandbox.interfaces.runner import (
    CancelAttempt,
    OpenTerminal,
    RunnerUnreachableError,
    TerminalConnection,
    TerminalRefusedError,
)
from sandbox.interfaces.server_services import (
    ArtifactNotFoundError,
    Cancellation,
    SandboxNotPreservedError,
    StoredArtifact,
    TaskEndedError,
    TaskNotEndedError,
    TaskNotFoundError,
    UnavailableError,
)
from sandbox.interfaces.store import IndexedTask, Store, TaskPage, TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import error_reason
from sandbox.model.events import CancelRequested, TaskFinished
from sandbox.model.fixed_limits import CANCEL_TIMEOUT_SECONDS, CANCEL_TIMEOUT_SECONDS_MIN, CHAIN_TOTALS_TASKS_MAX
from sandbox.model.state_machine import IllegalEventError
from sandbox.model.task import Task, reserved_artifact_names
from sandbox.model.task_state import TaskState
from sandbox.primitives import fair_client_shares
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.journal_replay import JournalReplayer, ReplaySlot
from sandbox.server.placements import Placements
from sandbox.server.preserved_sandboxes import DebugSessions, PreservedSandboxes
from sandbox.server.pruning import Pruner
from sandbox.server.tracked_task import NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask, TrackedTasks

_NOT_STARTED_MESSAGE = "The task was cancelled before it started."
STOPPING_MESSAGE = "The task is being stopped; its results so far are stored."


class Canceller:
    """Tries to deliver a cancel request until it is on disk or CANCEL_TIMEOUT_SECONDS have passed.

    A delivery that is in progress at that time may take longer.
    """

    def __init__(self, journals: Journals, clock: Clock) -> None:
        self._journals = journals
        self._replayer = JournalReplayer(journals)
        """These slots are not shared with launches, so a cancel request never waits for the replays of launches."""
        self._clock = clock

    async def cancel(self, tracked: TrackedTask, request: CancelAttempt) -> str:
        """Return a message for the caller once the request is durable. Raises TaskEndedError, UnavailableError."""
        deadline = self._clock.monotonic() + CANCEL_TIMEOUT_SECONDS
        async with self._write_lock(tracked, deadline):
            pass
        # Leave time to reach a runner that has just started, even if the wait for the lock was long.
        deadline = max(deadline, self._clock.monotonic() + CANCEL_TIMEOUT_SECONDS_MIN)
        while True:
            try:
                message = await self._try_cancel(tracked, request, deadline)
            except (JournalDamagedError, IllegalEventError) as error:
                raise UnavailableError(f"The task is blocked and cannot be cancelled: {error.message}") from error
            except OSError as error:
                raise UnavailableError(f"The task could not be cancelled: {error}; try again.") from error
            if message is not None:
                return message
            if self._clock.monotonic() >= deadline:
                raise UnavailableError(f"The runner of task {tracked.task.id} is not responding; try again.")
            await tracked.wait_for_change(0.05)

    async def _try_cancel(self, tracked: TrackedTask, request: CancelAttempt, deadline: float) -> str | None:
        """Return a message, or None to try again."""
        cancel_requested = CancelRequested(request.reason, request.force)
        async with self._write_lock(tracked, deadline):
            owner = tracked.owner
            if isinstance(owner, ServerOwned):
                await asyncio.to_thread(_cancel_pending, owner.recorder, cancel_requested)
                tracked.transfer(NoKnownOwner())
                return _NOT_STARTED_MESSAGE
        if tracked.task.state.is_final:
            raise TaskEndedError(tracked.task)
        if isinstance(owner, NoKnownOwner):
            return await self._record_cancel(tracked, cancel_requested, deadline)
        try:
            reply = await owner.runner.cancel(request)
        except RunnerUnreachableError:
            return await self._record_cancel(tracked, cancel_requested, deadline)
        if reply.was_disk_write_rejected:
            raise OSError(reply.message)
        if not reply.done:
            return None
        return reply.message or STOPPING_MESSAGE

    async def _record_cancel(
        self, tracked: TrackedTask, cancel_requested: CancelRequested, deadline: float
    ) -> str | None:
        """Record the request if no runner holds the journal. Return a message, or None to try again."""
        if tracked.writer_lock_state(self._journals) is not LockState.FREE:
            return None
        try:
            async with (
                self._slot(self._remaining_seconds(deadline)) as slot,
                self._write_lock(tracked, deadline),
                self._replayer.recorder(tracked.task.id, tracked.replay_state, slot, self._clock.now) as recorder,
            ):
                if recorder.task.state.is_final:
                    return None
                await asyncio.to_thread(recorder.record, cancel_requested)
        except JournalBusyError:
            return None
        tracked.wake()  # the tailer reads the new record
        return _describe_outcome(recorder.task)

    @asynccontextmanager
    async def _slot(self, timeout_seconds: float) -> AsyncIterator[ReplaySlot]:
        """Wait for a replay slot. Raises UnavailableError if none becomes free within `timeout_seconds`."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(timeout_seconds):
                    slot = await stack.enter_async_context(self._replayer.slot())
            except TimeoutError as error:
                raise UnavailableError(
                    "The server is still cancelling other tasks whose runners died; try again."
                ) from error
            yield slot

    @asynccontextmanager
    async def _write_lock(self, tracked: TrackedTask, deadline: float) -> AsyncIterator[None]:
        """Hold `tracked.write_lock`. Raises UnavailableError if the deadline passes first."""
        try:
            async with asyncio.timeout(self._remaining_seconds(deadline)):
                await tracked.write_lock.acquire()
        except TimeoutError as error:
            message = f"Task {tracked.task.id} is being passed to a runner and cannot be cancelled at this moment"
            raise UnavailableError(f"{message}; try again.") from error
        try:
            yield
        finally:
            tracked.write_lock.release()

    def _remaining_seconds(self, deadline: float) -> float:
        return max(deadline - self._clock.monotonic(), CANCEL_TIMEOUT_SECONDS_MIN)


def _cancel_pending(recorder: Recorder, cancel_requested: CancelRequested) -> None:
    """End a task that has not started, and release its journal."""
    recorder.record(cancel_requested)
    recorder.record(TaskFinished())
    recorder.writer.close()


def _describe_outcome(task: Task) -> str:
    """Describe the effect of a cancel request that was just recorded."""
    if task.cancel is None:
        return CANCEL_TOO_LATE
    return _NOT_STARTED_MESSAGE if task.attempt is None else STOPPING_MESSAGE


_CANCEL_RECORD_SECONDS = 0.5
"""Maximum time to wait until the server has read a recorded cancel request from the journal."""


class TaskQueries:
    """Implements `interfaces.server_services.TaskQueries`. Unfinished tasks are in memory, all others in the index."""

    def __init__(self, tracked_tasks: TrackedTasks, store: Store, placements: Placements) -> None:
        self._tracked_tasks = tracked_tasks
        self._store = store
        self._placements = placements

    async def status(self, task_id: str) -> Task:
        """See `interfaces.server_services.TaskQueries.status`."""
        tracked = self._tracked_tasks.get(task_id)
        if tracked is None or tracked.task.state.is_final:  # a task that has ended may have been deleted
            return await self._load(task_id, self._store.load)
        return tracked.task_with_status_message

    async def query(self, query: TaskQuery) -> TaskPage:
        """See `interfaces.server_services.TaskQueries.query`."""
        page = await fair_client_shares.to_thread(self._store.query, query)
        return dataclasses.replace(page, tasks=[self._with_status_message(task) for task in page.tasks])

    async def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        """See `interfaces.server_services.TaskQueries.prompt_beginnings`."""
        return await fair_client_shares.to_thread(self._store.prompt_beginnings, task_ids, length)

    async def chain(self, task: Task) -> Sequence[Task]:
        """See `interfaces.server_services.TaskQueries.chain`."""
        # The id of a removed task can be used again, even by a task that continues a later task of the chain.
        earlier, later, ids = [task], [task], {task.id}
        while (
            (parent := earlier[-1].parent) is not None
            and parent.task_id not in ids
            and len(ids) < CHAIN_TOTALS_TASKS_MAX
        ):
            try:
                earlier.append(await self._load(parent.task_id, self._store.load_without_large_fields))
            except TaskNotFoundError:
                break
            ids.add(parent.task_id)
        for each in later:  # grows in the loop
            # Only a task that has ended can be continued.
            if each.state.is_final and (left := CHAIN_TOTALS_TASKS_MAX - len(ids)) > 0:
                page = await self.query(TaskQuery(parent=each.id, order="asc", limit=left))
                later += [child for child in page.tasks if child.id not in ids]
                ids |= {child.id for child in page.tasks}
        return [*reversed(earlier), *later[1:]]

    def job_status(self, task_id: str) -> JobStatus | None:
        """See `interfaces.server_services.TaskQueries.job_status`."""
        return self._placements.job_status(task_id)

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        """See `interfaces.server_services.TaskQueries.wait`."""
        tracked = self._tracked_tasks.get(task_id)
        if tracked is None:
            return await self._load(task_id, self._store.load)
        await tracked.wait_for_end(timeout_seconds)
        return tracked.task_with_status_message

    def _with_status_message(self, task: Task) -> Task:
        """Add the reason why a task is waiting, which the index does not contain."""
        tracked = self._tracked_tasks.get(task.id)
        return tracked.with_status_message(task) if tracked is not None else task

    async def _load(self, task_id: str, load: Callable[[str], IndexedTask | None]) -> Task:
        indexed = await fair_client_shares.to_thread(load, task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        return indexed.task


class TaskCancellation:
    """Implements `interfaces.server_services.TaskCancellation`."""

    def __init__(self, tracked_tasks: TrackedTasks, queries: TaskQueries, canceller: Canceller, clock: Clock) -> None:
        self._tracked_tasks = tracked_tasks
        self._queries = queries
        self._canceller = canceller
        self._clock = clock

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        """See `interfaces.server_services.TaskCancellation.cancel`."""
        tracked = self._tracked_tasks.get(task_id)
        previous = tracked.task if tracked is not None else await self._queries.status(task_id)
        if previous.state.is_final:
            raise TaskEndedError(previous)
        tracked = tracked or self._tracked_tasks.get(task_id)
        if tracked is None:
            raise UnavailableError(f"Task {task_id} is being accepted; try again.")
        message = await self._canceller.cancel(tracked, CancelAttempt(reason, force))
        if message != CANCEL_TOO_LATE:
            await self._wait_for_record(tracked)
        task = tracked.task
        return Cancellation(previous, task.state, task.cancel_requested_at or self._clock.now(), message)

    async def _wait_for_record(self, tracked: TrackedTask) -> None:
        """Wait, up to a timeout, until the tailer has read the request's record, which contains the request's time."""
        tracked.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_RECORD_SECONDS):
                while tracked.task.cancel is None and not tracked.task.state.is_final:
                    await tracked.wait_for_change(_CANCEL_RECORD_SECONDS)


class TaskDeletion:
    """Implements `interfaces.server_services.TaskDeletion`."""

    def __init__(
        self,
        tracked_tasks: TrackedTasks,
        queries: TaskQueries,
        preserved_sandboxes: PreservedSandboxes,
        pruner: Pruner,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._queries = queries
        self._preserved_sandboxes = preserved_sandboxes
        self._pruner = pruner

    async def delete(self, task_id: str) -> str:
        """See `interfaces.server_services.TaskDeletion.delete`."""
        tracked = self._tracked_tasks.get(task_id)
        task = tracked.task if tracked is not None else await self._queries.status(task_id)
        if not task.state.is_final:
            raise TaskNotEndedError(task, "delete")
        with contextlib.suppress(SandboxNotPreservedError):
            await self._preserved_sandboxes.release(task)
        try:
            failure = await self._pruner.delete(task)
        except (OSError, TimeoutError) as error:
            reason = error_reason(error)
            raise UnavailableError(f"Task {task_id} could not be deleted: {reason}; try again.") from error
        if failure:
            rest = "the server tries every five minutes to remove the rest"
            return f"Task {task_id} was deleted. Some files still use disk space: {failure}; {rest}."
        return f"Task {task_id} was deleted."


class TaskArtifacts:
    """Implements `interfaces.server_services.TaskArtifacts`. File names come from the journal, never from a request.

    An artifact is in the server's data directory before the record that names it, wherever the attempt runs.
    """

    def __init__(self, data_dir: Path, queries: TaskQueries) -> None:
        self._data_dir = data_dir
        self._queries = queries

    async def list_artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        """See `interfaces.server_services.TaskArtifacts.list_artifacts`."""
        return await fair_client_shares.to_thread(self._list, await self._queries.status(task_id))

    async def find_artifact(self, task_id: str, name: str) -> StoredArtifact:
        """See `interfaces.server_services.TaskArtifacts.find_artifact`."""
        return await fair_client_shares.to_thread(self._find, await self._queries.status(task_id), name)

    def _list(self, task: Task) -> Sequence[StoredArtifact]:
        stored = (self._locate(task, artifact) for artifact in task.artifacts if not artifact.is_internal)
        return [each for each in stored if each is not None]

    def _find(self, task: Task, name: str) -> StoredArtifact:
        # A workspace file whose path is the name of a generated artifact must not be mistaken for this artifact.
        for key in ("name",) if name in reserved_artifact_names(task) else ("name", "path"):
            for artifact in task.artifacts:
                if artifact.is_internal:
                    continue
                if getattr(artifact, key) == name and (stored := self._locate(task, artifact)) is not None:
                    return stored
        raise ArtifactNotFoundError(task.id, name)

    def _locate(self, task: Task, artifact: Artifact) -> StoredArtifact | None:
        file = TaskLayout(self._data_dir, task.id).artifacts / artifact.name
        try:
            modified = file.stat().st_mtime
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return None
            raise
        return StoredArtifact(artifact, file, datetime.fromtimestamp(modified, UTC))


class TaskSandboxes:
    """Implements `interfaces.server_services.TaskSandboxes`."""

    def __init__(
        self,
        tracked_tasks: TrackedTasks,
        queries: TaskQueries,
        preserved_sandboxes: PreservedSandboxes,
        debug_sessions: DebugSessions,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._queries = queries
        self._preserved_sandboxes = preserved_sandboxes
        self._debug_sessions = debug_sessions

    async def open_terminal(self, task_id: str, request: OpenTerminal) -> TerminalConnection:
        """See `interfaces.server_services.TaskSandboxes.open_terminal`."""
        task = await self._queries.status(task_id)
        if task.state is TaskState.FAILED_PRESERVED:
            return await self._debug_sessions.open_terminal(task, request)
        if task.state.is_final or task.attempt is None:
            reason = "its sandbox was removed" if task.state.is_final else "it has no sandbox yet"
            raise TerminalRefusedError(f"Task {task_id} is {task.state}; {reason}.")
        tracked = self._tracked_tasks.get(task_id)
        if tracked is not None and isinstance(tracked.owner, RunnerOwned):
            with contextlib.suppress(RunnerUnreachableError):
                return await tracked.owner.runner.open_terminal(request)
        raise UnavailableError(f"The runner of task {task_id} is not responding; try again.")

    async def has_preserved_sandbox(self, task: Task) -> bool:
        """See `interfaces.server_services.TaskSandboxes.has_preserved_sandbox`."""
        return task.id in await self.preserved_sandboxes([task])

    async def preserved_sandboxes(self, tasks: Sequence[Task]) -> Set[str]:
        """See `interfaces.server_services.TaskSandboxes.preserved_sandboxes`."""
        candidates = [task for task in tasks if task.state is TaskState.FAILED_PRESERVED]
        if not candidates:
            return frozenset()
        async with fair_client_shares.thread_slot():  # a slow host must not keep a shared thread busy
            return await run_in_daemon_thread(partial(self._preserved_sandboxes.find_preserved, candidates))

    async def release(self, task_id: str) -> None:
        """See `interfaces.server_services.TaskSandboxes.release`."""
        await self._preserved_sandboxes.release(await self._queries.status(task_id))
