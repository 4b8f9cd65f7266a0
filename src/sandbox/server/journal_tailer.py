"""Tails the journals of unfinished tasks, updates the index and notifies subscribers."""

import asyncio
import logging

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalOffsetError, Journals, LockState, RecordBatch
from sandbox.interfaces.store import IndexedTask
from sandbox.model import events as e
from sandbox.model.fixed_limits import (
    FOLLOW_POLL_INTERVAL_SECONDS,
    HOST_ERROR_PAUSE_SECONDS,
    JOURNAL_SILENCE_SECONDS,
    RUNNER_SILENCE_SECONDS,
)
from sandbox.model.state_machine import replay
from sandbox.model.task import Task
from sandbox.model.wire.event_conversion import end_event, to_wire_event
from sandbox.primitives.log_context import bind_task
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.event_streams import Broadcast
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_replay import JournalReplayer
from sandbox.server.recovery import RunnerRecovery
from sandbox.server.tracked_task import NoKnownOwner, ServerOwned, TrackedTask

_POLL_SLOWDOWN_MAX = 10
"""The pause between reads of a silent journal grows by up to this factor."""
_UNKNOWN_WRITER_MESSAGE = "The runner's host is not responding; the task's current state is unknown."
_log = logging.getLogger(__name__)
_INDEXED_IMMEDIATELY = (
    *(e.AttemptStarted, e.AgentExited, e.AttemptFailed, e.AttemptTornDown),
    *(e.CancelRequested, e.Progress),
)
"""Events that are indexed immediately.

`ArtifactCollected` is not one of them: a row contains all artifacts of its task, so indexing each artifact would take
quadratic time.
"""


class JournalTailer:
    """Follows each unfinished task. It never writes the index ahead of the journal, and at most a second after it.

    tracked_tasks: the tasks that are followed; other components only read this mapping.
    dispatcher: queues tasks that are waiting, and frees the resources of tasks that have ended.
    recovery: continues tasks whose journal no process holds, and checks runners that record nothing.
    """

    def __init__(
        self,
        tracked_tasks: dict[str, TrackedTask],
        journals: Journals,
        index_writer: IndexWriter,
        clock: Clock,
        broadcast: Broadcast,
        dispatcher: Dispatcher,
        recovery: RunnerRecovery,
    ) -> None:
        self._tracked_tasks = tracked_tasks
        self._dispatcher = dispatcher
        self._recovery = recovery
        self._journals = journals
        self._journal_replayer = JournalReplayer(journals)
        self._index_writer = index_writer
        self._clock = clock
        self._broadcast = broadcast
        self._asyncio_tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, tracked: TrackedTask, submission: e.Record | None = None) -> None:
        """Follow a task until it is finished; `submission` is published if the task is new."""
        task_id = tracked.task.id
        if submission is not None:
            self._publish(task_id, submission)
        self._tracked_tasks[task_id] = tracked
        self._asyncio_tasks[task_id] = asyncio.create_task(self._run(tracked), name=f"follow {task_id}")

    async def close(self) -> None:
        """Stop following; the tasks continue."""
        for task in self._asyncio_tasks.values():
            task.cancel()
        await asyncio.gather(*self._asyncio_tasks.values(), return_exceptions=True)
        await self._index_writer.close()

    async def _run(self, tracked: TrackedTask) -> None:
        """Follow a task. Retry after every error, because a task that is not followed never seems to end."""
        bind_task(tracked.task.id)
        while not tracked.task.state.is_final:
            try:
                await self._tail(tracked)
            except Exception as error:
                tracked.report_error(error)
                await asyncio.sleep(HOST_ERROR_PAUSE_SECONDS)
        await self._recovery.release_host(tracked)
        # The id of a pruned task may be reused before the tailer of the first task ends.
        if self._tracked_tasks.get(tracked.task.id) is tracked:
            del self._tracked_tasks[tracked.task.id], self._asyncio_tasks[tracked.task.id]
            self._dispatcher.finish(tracked)

    async def _tail(self, tracked: TrackedTask) -> None:
        with self._journals.watch(tracked.task.id, tracked.wake) as is_watched:
            await self._tail_watched(tracked, is_watched=is_watched)

    async def _tail_watched(self, tracked: TrackedTask, *, is_watched: bool) -> None:
        """Read the journal after each write. is_watched: whether a write wakes this coroutine; if not, it polls."""
        pause = FOLLOW_POLL_INTERVAL_SECONDS
        last_record_at = self._clock.monotonic()
        while not tracked.task.state.is_final:
            batch = await self._read_batch(tracked)
            now = self._clock.monotonic()
            if batch.records:
                if (await self._apply(tracked, batch)).state.is_final:
                    return
                last_record_at, pause = now, FOLLOW_POLL_INTERVAL_SECONDS
                # A batch may end before the journal does. The writer may have ended, so do not wait for its next write.
                await asyncio.sleep(FOLLOW_POLL_INTERVAL_SECONDS)
                continue
            if now - last_record_at >= JOURNAL_SILENCE_SECONDS:
                last_record_at = now
                await self._check_writer(tracked)
            await tracked.wait_for_wake(_wait_seconds(tracked, pause, is_watched=is_watched))
            pause = min(pause * 1.2, FOLLOW_POLL_INTERVAL_SECONDS * _POLL_SLOWDOWN_MAX)

    async def _read_batch(self, tracked: TrackedTask) -> RecordBatch:
        """Return new records.

        After a power loss the index may be ahead of the journal; then the journal is replayed from the beginning.
        """
        try:
            # A record that the server is still writing may be removed if the disk fails to flush it.
            async with tracked.write_lock:
                batch = self._journals.read(tracked.task.id, tracked.offset)
                if (
                    isinstance(tracked.owner, ServerOwned)
                    and batch.records
                    and batch.records[-1].seq > tracked.owner.recorder.writer.last_seq
                ):
                    return RecordBatch((), tracked.offset)
            if not batch.records or batch.records[0].seq == tracked.task.last_seq + 1:
                return batch
        except JournalOffsetError:
            pass
        replay_state = await self._journal_replayer.read_task(tracked.task.id)
        if replay_state.task is not None:
            await self._index_writer.save(IndexedTask(replay_state.task, replay_state.offset))
            self._update(tracked, replay_state.task, replay_state.offset)
        return RecordBatch((), tracked.offset)

    async def _apply(self, tracked: TrackedTask, batch: RecordBatch) -> Task:
        """Apply the records, index the task, then publish them. A retry publishes no record twice.

        Returns the new state of the task.
        """
        task = tracked.task
        for record in batch.records:
            task = replay(task, record)
        if _needs_indexing(batch):
            await self._index_writer.save(IndexedTask(task, batch.next_offset))
        else:
            self._index_writer.save_later(IndexedTask(task, batch.next_offset))
        # A record may be read twice: a writer removes a record that it cannot flush, and writes it again later.
        for record in batch.records[max(0, tracked.published_seq + 1 - batch.records[0].seq) :]:
            self._publish(task.id, record)
            if record.transition is not None:
                _log_transition(task, record.transition)
        tracked.published_seq = max(tracked.published_seq, task.last_seq)
        self._update(tracked, task, batch.next_offset)
        if task.state.is_final and self._broadcast.has_subscribers:
            self._broadcast.publish(end_event(task))
        return task

    def _update(self, tracked: TrackedTask, task: Task, offset: int) -> None:
        """Update the tracked task to the state that was read from its journal.

        Find its runner if an earlier server launched the attempt without indexing it.
        """
        previous = tracked.task.attempt
        tracked.update(task, offset)
        if task.attempt is not None and (previous is None or previous.id != task.attempt.id):
            self._recovery.transfer_to_runner(tracked)

    def _publish(self, task_id: str, record: e.Record) -> None:
        if record.transition is not None:
            self._broadcast.notify_state_change()
        if self._broadcast.has_subscribers and (event := to_wire_event(task_id, record)) is not None:
            self._broadcast.publish(event)

    async def _check_writer(self, tracked: TrackedTask) -> None:
        """Check whether a silent writer is alive. Only a FREE lock proves that no process is writing."""
        owner = tracked.owner
        if isinstance(owner, ServerOwned):
            return
        match tracked.writer_lock_state(self._journals):
            case LockState.HELD:
                tracked.status_message = ""
                await self._recovery.check_silent_runner(tracked)
            case LockState.UNKNOWN:
                tracked.status_message = _UNKNOWN_WRITER_MESSAGE
            case LockState.FREE if not (await self._read_batch(tracked)).records and tracked.owner is owner:
                if not isinstance(owner, NoKnownOwner):
                    tracked.transfer(NoKnownOwner())
                if await self._recovery.recover(tracked):
                    self._dispatcher.enqueue_recovered(tracked)


def _wait_seconds(tracked: TrackedTask, poll_pause_seconds: float, *, is_watched: bool) -> float:
    """Return how long to wait for the next write if nothing wakes the task.

    While the server holds the journal, only the server writes to it, and calls `wake` after each write. No check
    for a live writer is needed, so thousands of waiting tasks cost nothing.
    """
    if isinstance(tracked.owner, ServerOwned):
        return RUNNER_SILENCE_SECONDS if is_watched else JOURNAL_SILENCE_SECONDS
    return JOURNAL_SILENCE_SECONDS if is_watched else poll_pause_seconds


def _log_transition(task: Task, transition: e.Transition) -> None:
    error = task.failure.code if task.failure is not None and transition.new_state.is_final else None
    _log.info("Task %s is %s", task.id, transition.new_state, extra={"state": transition.new_state, "error": error})


def _needs_indexing(batch: RecordBatch) -> bool:
    return any(
        record.transition is not None or isinstance(record.event, _INDEXED_IMMEDIATELY) for record in batch.records
    )
