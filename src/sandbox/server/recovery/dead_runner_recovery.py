"""Recovers tasks whose runner died."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, Journals, Recorder
from sandbox.interfaces.placement import HostPendingError, ReservedHost
from sandbox.model.events import ErrorReported
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.retry import backoff_seconds
from sandbox.model.task import Task
from sandbox.server.placement_routing import Placements, attempt_location, takes_over_disk
from sandbox.server.recovery.journal_replay_threads import JournalReplayer
from sandbox.server.recovery.runner_watchdog import RunnerWatchdog
from sandbox.server.recovery.task_ending import end_lost_attempt, end_without_follow_up
from sandbox.server.runner_launcher import RunnerLauncher
from sandbox.server.start_conditions import StartConditions
from sandbox.server.task_secrets import TaskSecrets
from sandbox.server.tracked_task import NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask

_log = logging.getLogger(__name__)

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
        """Give back the host of a task that has ended. An error is only logged, because the next server tries again."""
        try:
            await self._placements.release_host(tracked.task.id)
        except OSError as error:
            _log.warning("The host of task %s was not given back: %s", tracked.task.id, error)

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

        If a finisher dies, another one is started, after a pause that grows each time. After FINISHERS_MAX finishers
        have died, the server finalizes the task itself, as it does for a task that ends before its first attempt.
        """
        if not tracked.track_idle(backoff_seconds(tracked.task), self._clock.monotonic()):
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
