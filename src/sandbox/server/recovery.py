"""Recovers tasks after a start of the server or the death of a runner."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, Journals, Recorder, ReplayState
from sandbox.interfaces.placement import HostPendingError, ReservedHost
from sandbox.interfaces.store import IndexDamagedError, IndexedTask, Store
from sandbox.model.errors import SandboxError
from sandbox.model.events import ErrorReported, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import (
    RUNNER_PINGS_MAX,
    RUNNER_SILENCE_SECONDS,
)
from sandbox.model.state_machine import backoff_seconds
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.server.ending_without_runner import end_lost_attempt, end_without_follow_up
from sandbox.server.index_writer import update_index
from sandbox.server.journal_replay import JournalReplayer
from sandbox.server.placements import Placements, attempt_location, takes_over_disk
from sandbox.server.runner_launcher import RunnerLauncher, TaskSecrets
from sandbox.server.start_conditions import StartConditions
from sandbox.server.tracked_task import JournalOwner, NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Silence:
    """A silent journal. started_at: the start of the silence, or the time of the last ping."""

    owner: JournalOwner
    seq: int
    started_at: float
    unanswered_count: int = 0


class RunnerWatchdog:
    """Pings silent runners. A lock proves that its holder is alive, not that the holder is working.

    A runner's death ends its sandbox and frees its lock, so a finisher can take over.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._silences: WeakKeyDictionary[TrackedTask, _Silence] = WeakKeyDictionary()

    async def check(self, tracked: TrackedTask) -> None:
        """Check a task whose journal is held but has no new records. Call it periodically."""
        now, owner, seq = self._clock.monotonic(), tracked.owner, tracked.task.last_seq
        silence = self._silences.get(tracked)
        if silence is None or silence.owner is not owner or silence.seq != seq:
            self._silences[tracked] = _Silence(owner, seq, now)
            return
        if not isinstance(owner, RunnerOwned) or now - silence.started_at < RUNNER_SILENCE_SECONDS:
            return
        silence.started_at, runner = now, owner.runner
        silence.unanswered_count = 0 if await runner.may_be_responsive() else silence.unanswered_count + 1
        if silence.unanswered_count < RUNNER_PINGS_MAX:
            return
        if await runner.kill():
            outcome = "killed"
        elif silence.unanswered_count == RUNNER_PINGS_MAX:
            outcome = "not killed, because no runner holds its journal"
        else:
            return
        _log.error(
            "The runner of attempt %s did not respond %s times: %s", runner.attempt_id, RUNNER_PINGS_MAX, outcome
        )


_RUNNER_LOST = Failure(FailureCode.RUNNER_LOST, "The task's runner died, and its sandbox could not be removed.")
_COLLECT_FAILED = Failure(
    FailureCode.COLLECT_FAILED,
    "The agent had ended, but the task's runner died, and not all results could be stored; submit the task again.",
)
_CLEANUP_FAILED_MESSAGE = (
    "The sandbox may not have been removed completely: the task's runner died, and the cleanup failed."
)


class RunnerRecovery:
    """Continues tasks whose journal no process holds, and finds runners that earlier servers started."""

    def __init__(
        self,
        journals: Journals,
        placements: Placements,
        launcher: RunnerLauncher,
        secrets: TaskSecrets,
        conditions: StartConditions,
        clock: Clock,
    ) -> None:
        self._journals = journals
        self._replayer = JournalReplayer(journals)
        self._placements = placements
        self._watchdog = RunnerWatchdog(clock)
        self._launcher = launcher
        self._secrets = secrets
        self._conditions = conditions
        self._clock = clock

    def transfer_to_runner(self, tracked: TrackedTask) -> None:
        """Transfer the journal to the runner of the current attempt, if an earlier server launched it."""
        attempt, owner = tracked.task.attempt, tracked.owner
        if attempt is None or isinstance(owner, ServerOwned):
            return
        if isinstance(owner, NoKnownOwner) or owner.runner.attempt_id != attempt.id:
            tracked.transfer(RunnerOwned(self._placements.find_runner(attempt_location(tracked.task, attempt))))

    async def check_silent_runner(self, tracked: TrackedTask) -> None:
        """Check the runner of a task whose journal is held but has had no new record for a while."""
        await self._watchdog.check(tracked)

    async def release_host(self, tracked: TrackedTask) -> None:
        """Release the host of a task that has ended. An error is only logged; a restarted server tries again."""
        try:
            await self._placements.release_host(tracked.task.id)
        except OSError as error:
            _log.warning("The host of task %s was not released: %s", tracked.task.id, error)

    async def recover(self, tracked: TrackedTask) -> bool:
        """Recover a task whose journal no process holds. Return whether the task is now waiting to be launched.

        This is the case if the journal was in use at the server's start and the server has now acquired it. Raises
        OSError, JournalDamagedError.
        """
        if tracked.task.is_waiting_to_start:
            return await self._acquire_journal(tracked)
        await self._recover_started(tracked)
        return False

    async def _acquire_journal(self, tracked: TrackedTask) -> bool:
        """Acquire a pending task's journal to launch it. Return whether it was free and the task is still waiting."""
        async with self._replayer.slot() as slot, tracked.write_lock:
            try:
                writer = await self._replayer.open(tracked.task.id, slot)
            except JournalBusyError:
                return False
            is_acquired = False
            try:
                task = (await self._replayer.read_from(tracked.task.id, tracked.replay_state, slot)).task
                if task is not None and task.is_waiting_to_start:
                    tracked.transfer(ServerOwned(self._journals.recorder(writer, task, self._clock.now)))
                    is_acquired = True
            finally:
                if not is_acquired:
                    writer.close()
            return is_acquired

    async def _recover_started(self, tracked: TrackedTask) -> None:
        """Start a finisher for a dead runner, or start the next attempt.

        If a finisher dies, another one is started, with backoff. After FINISHERS_MAX finishers
        have died, the server finalizes the task itself, as it does for a task that ends before its first attempt.
        """
        if not tracked.has_been_idle_for(backoff_seconds(tracked.task), self._clock.monotonic()):
            return
        reserved = None
        if _awaits_next_attempt(tracked.task):
            host_reason = self._placements.host_for_next_attempt(tracked.task).blocked_reason
            reason = host_reason or self._conditions.missing_key_reason(tracked.task.manifest)
            if reason is not None:
                tracked.status_message = f"Waiting: {reason}"
                return
            try:
                reserved = (
                    None if self._has_lost_disk(tracked.task) else await self._placements.reserve_host(tracked.task)
                )
            except HostPendingError as error:
                tracked.status_message = f"Waiting for a host: {error.message}"
                return
        if (
            not _awaits_next_attempt(tracked.task)
            and not _is_force_cancelled(tracked.task)
            and not tracked.finishers.is_backoff_over(self._clock.monotonic())
        ):
            tracked.status_message = "The cleanup failed; it is retried after a pause."
            return
        # Resolve the secrets before taking a slot or lock: a cancel request must not wait for an external Vault.
        secrets_or_failure = await self._secrets.resolve_for_attempt(tracked.task)
        # Take the slot first: a cancel request must not wait for the lock while this recovery waits for other tasks'
        # journals.
        with contextlib.suppress(JournalBusyError):
            async with (
                self._replayer.slot() as slot,
                tracked.write_lock,
                self._replayer.recorder(tracked.task.id, tracked.replay_state, slot, self._clock.now) as recorder,
            ):
                if not recorder.task.state.is_final:
                    await self._recover(recorder, tracked, secrets_or_failure, reserved)

    def _has_lost_disk(self, task: Task) -> bool:
        """Return whether the next attempt would take over a disk whose host was lost."""
        if task.attempt is None or not takes_over_disk(task):
            return False
        return self._placements.find_loss(attempt_location(task, task.attempt)) is not None

    async def _recover(
        self,
        recorder: Recorder,
        tracked: TrackedTask,
        secrets_or_failure: Mapping[str, str] | Failure,
        reserved: ReservedHost | None,
    ) -> None:
        attempt = recorder.task.attempt
        if attempt is None:
            tracked.transfer(await self._launcher.start_pending(recorder, secrets_or_failure, reserved))
        elif _awaits_next_attempt(recorder.task) and not self._has_lost_disk(recorder.task):
            if reserved is not None:  # otherwise the task has changed in the meantime
                tracked.transfer(await self._launcher.start_follow_up(recorder, secrets_or_failure, reserved))
                tracked.finishers.reset()
        elif (loss := self._placements.find_loss(attempt_location(recorder.task, attempt))) is not None:
            await asyncio.to_thread(end_lost_attempt, recorder, loss)
        elif tracked.finishers.is_exhausted:
            await asyncio.to_thread(_finalize_lost, recorder, tracked)
        else:
            tracked.transfer(await self._launcher.start_finisher(recorder, attempt, secrets_or_failure))
            tracked.finishers.record_launch(self._clock.monotonic())


def _awaits_next_attempt(task: Task) -> bool:
    return task.is_between_attempts and task.cancel is None and task.failure is None


def _is_force_cancelled(task: Task) -> bool:
    return task.cancel is not None and task.cancel.force


def _finalize_lost(recorder: Recorder, tracked: TrackedTask) -> None:
    """End a task whose finishers have all died."""
    if recorder.task.needs_only_teardown and not tracked.finishers.has_reported_leftovers:
        recorder.record(ErrorReported("teardown_failed", _CLEANUP_FAILED_MESSAGE))
        tracked.finishers.record_leftovers_report()
    end_without_follow_up(recorder, _COLLECT_FAILED if recorder.task.agent_has_exited else _RUNNER_LOST)


def recover(journals: Journals, store: Store, placements: Placements, clock: Clock) -> list[TrackedTask]:
    """Update the index from the journals; return the unfinished tasks: running tasks first, then waiting tasks.

    The server acquires the journal of a pending task to launch it; if another process may hold it, the task
    has no known owner. All other tasks belong to the runner of their last attempt, and the tailer detects a dead
    runner. An unreadable or locked journal affects only its own task; if the index row is damaged as well, the task can
    no longer be found.
    """
    for task_id, reason in update_index(journals, store).items():
        _log.error("Task %s cannot be added to the index: %s", task_id, reason, extra={"task_id": task_id})
        _drop_damaged(store, task_id)
    tracked_tasks = [_track(journals, placements, clock, indexed) for indexed in store.unfinished()]
    return sorted(tracked_tasks, key=lambda tracked: isinstance(tracked.owner, ServerOwned))


def _drop_damaged(store: Store, task_id: str) -> None:
    """Remove the index row of a task if it is damaged."""
    try:
        store.load(task_id)
    except IndexDamagedError:
        store.delete(task_id)
        _log.error("Task %s was removed from the index: its row is damaged", task_id, extra={"task_id": task_id})


def _track(journals: Journals, placements: Placements, clock: Clock, indexed: IndexedTask) -> TrackedTask:
    task = indexed.task
    if task.attempt is not None:
        return TrackedTask(indexed, RunnerOwned(placements.find_runner(attempt_location(task, task.attempt))))
    return _acquire(journals, clock, indexed)


def _acquire(journals: Journals, clock: Clock, indexed: IndexedTask) -> TrackedTask:
    """Acquire the journal of a pending task, if it is free and the task is still waiting."""
    try:
        writer = journals.open(indexed.task.id)
    except (SandboxError, OSError):
        return TrackedTask(indexed, NoKnownOwner())
    try:
        replay_state = journals.replay(indexed.task.id)
    except (SandboxError, OSError):
        replay_state = ReplayState(None, 0)
    if replay_state.task is None or replay_state.task.state is not TaskState.PENDING:
        writer.close()
        return TrackedTask(indexed, NoKnownOwner())
    recorder = journals.recorder(writer, replay_state.task, clock.now)
    if replay_state.task.cancel is not None or replay_state.task.failure is not None:
        # If the end cannot be recorded here, the launcher records it later.
        with contextlib.suppress(OSError):
            recorder.record(TaskFinished())
            writer.close()
            return TrackedTask(indexed, NoKnownOwner())
    return TrackedTask(IndexedTask(replay_state.task, replay_state.offset), ServerOwned(recorder))
