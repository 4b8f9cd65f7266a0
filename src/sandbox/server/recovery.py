"""Recovers tasks after a start of the server or the death of a runner, and removes leftovers of attempts.

An attempt belongs to this server if it has a directory in the data directory of the server or of the attempt's
placement: the directory is created before any other part of the attempt, and the log in it is kept. An attempt has
ended if its task has ended and no process holds the journal's lock. The leftover remover holds this lock while it
removes leftovers, so it never disturbs an attempt that is being planned, run or finished.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals, LockState, Recorder, ReplayState
from sandbox.interfaces.placement import AttemptFiles, HostPendingError, Leftover, ReservedHost
from sandbox.interfaces.store import IndexDamagedError, IndexedTask, Store
from sandbox.interfaces.task_file_layout import TaskLayout, tasks_root
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.events import ErrorReported, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import (
    RUNNER_PINGS_MAX,
    RUNNER_SILENCE_SECONDS,
    SANDBOX_TEARDOWN_SECONDS,
)
from sandbox.model.state_machine import backoff_seconds
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.model.task_state import TaskState
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.derived_tasks import discard_inheritance, has_own_artifacts
from sandbox.server.ending_without_runner import end_lost_attempt, end_without_follow_up
from sandbox.server.index_writer import update_index
from sandbox.server.journal_replay import JournalReplayer
from sandbox.server.placements import Placements, attempt_location, takes_over_disk
from sandbox.server.preserved_sandboxes import PreservedSandboxes
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


def discard_unrecorded_tasks(data_dir: Path, journals: Journals, store: Store) -> None:
    """Remove the files and journals of tasks for which an earlier server died before it wrote the first record.

    Such a task was never acknowledged: its journal exists and is empty, and the task is not in the index. Call this
    function before the server accepts tasks. Raises StoreError.
    """
    try:
        names = [path.name for path in tasks_root(data_dir).iterdir() if is_task_id(path.name)]
    except FileNotFoundError:
        return
    accepted = frozenset(journals.task_ids()) | store.task_ids()
    for task_id in names:
        layout = TaskLayout(data_dir, task_id)
        if task_id in accepted:
            continue
        try:
            was_accepted = has_own_artifacts(layout)
        except OSError as error:
            _log.error("Task %s has no record, and its files cannot be listed (%s); check the disk", task_id, error)
            continue
        if was_accepted:
            # A backup contains zeros in place of a journal that could not be read. They look like an unfinished record.
            _log.error("Task %s has results, but its journal has no record; restore the journal from a backup", task_id)
            continue
        if layout.artifacts.is_dir() and _has_empty_journal(journals, task_id):
            discard_inheritance(layout)
            _log.info("Removed the files of task %s, which was never accepted", task_id)
        with suppress(OSError):  # the journal may be damaged
            if set(layout.root.iterdir()) <= {layout.journal}:
                journals.discard(task_id, journals.create(task_id))


def _has_empty_journal(journals: Journals, task_id: str) -> bool:
    """Return whether the journal exists and has no record. Returns False if the journal is missing or damaged."""
    try:
        return journals.replay(task_id).task is None
    except (SandboxError, OSError):
        return False


class LeftoverRemovalError(SandboxError):
    """Some leftovers could not be removed."""

    code = "internal_error"


class LeftoverRemover:
    """Removes leftovers. all_files: the attempt files of each placement."""

    def __init__(
        self,
        journals: Journals,
        store: Store,
        preserved_sandboxes: PreservedSandboxes,
        all_files: Sequence[AttemptFiles],
    ) -> None:
        self._journals = journals
        self._store = store
        self._preserved_sandboxes = preserved_sandboxes
        self._all_files = all_files

    async def sweep(self) -> None:
        """Scan everything once. A failure does not stop the rest; raises LeftoverRemovalError at the end."""
        failures = []
        for files in self._all_files:
            try:
                failures += await self._sweep_placement(files)
            except OSError as error:
                failures.append(error_reason(error))
        if failures:
            raise LeftoverRemovalError("; ".join(failures))

    async def _sweep_placement(self, files: AttemptFiles) -> list[str]:
        """Remove a placement's leftovers; return failures. Raises OSError if nothing could be scanned."""
        scan = await files.scan()
        failures = list(scan.failures)
        for task_id, leftovers in _group_by_task(scan.leftovers).items():
            try:
                failures += await self._sweep_task(files, task_id, leftovers)
            except OSError as error:
                failures.append(f"the journal or lock of task {task_id}: {error}")
            except SandboxError as error:
                failures.append(f"task {task_id}: {error}")
        for kind, attempt_ids in scan.unowned.items():
            for attempt_id in attempt_ids:
                try:
                    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                        await files.clean_up_unowned(kind, attempt_id)
                except (SandboxError, OSError, ValueError, TimeoutError) as error:
                    failures.append(f"{kind} of attempt {attempt_id}: {error_reason(error)}")
        return failures

    async def _sweep_task(self, files: AttemptFiles, task_id: str, leftovers: Sequence[Leftover]) -> list[str]:
        """Remove one task's leftovers; return failures. Raises StoreError, and OSError if a file is unreadable."""
        task = await run_in_daemon_thread(partial(self._load_task, task_id))
        if task is None or not task.state.is_final:
            return []
        failures = []
        with self._journals.try_lock(task_id) as has_lock:
            for leftover in leftovers if has_lock else ():
                try:
                    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                        await self._sweep_attempt(files, task, leftover)
                except (SandboxError, OSError, ValueError, TimeoutError) as error:
                    attempt_id = leftover.location.attempt_id
                    failures.append(f"attempt {attempt_id} of task {task_id}: {error_reason(error)}")
        return failures

    def _load_task(self, task_id: str) -> Task | None:
        """Load the task from the index or a FREE journal: right after the server starts, the index may be outdated."""
        indexed = self._store.load(task_id)
        if indexed is None:
            return None
        if indexed.task.state.is_final or self._journals.lock_state(task_id) is not LockState.FREE:
            return indexed.task
        try:
            return self._journals.replay(task_id, ReplayState(indexed.task, indexed.offset)).task
        except (JournalDamagedError, FileNotFoundError):
            return None  # the tailer reports it

    async def _sweep_attempt(self, files: AttemptFiles, task: Task, leftover: Leftover) -> None:
        if await asyncio.to_thread(self._has_preserved_disk, task, leftover):
            if not leftover.kinds and not leftover.has_sandbox_handle:
                return
            async with self._preserved_sandboxes.try_exclusive_use(task) as is_exclusive:
                if not is_exclusive:
                    return
                await files.clean_up(leftover, keeps_disk=True)
        else:
            await files.clean_up(leftover, keeps_disk=False)
        kinds = ", ".join([*leftover.kinds, "files"])
        _log.info("Removed the leftovers of attempt %s: %s", leftover.location.attempt_id, kinds)

    def _has_preserved_disk(self, task: Task, leftover: Leftover) -> bool:
        """Return whether the attempt has the disk of a preserved sandbox. Blocks. Raises OSError."""
        location = self._preserved_sandboxes.find_location(task)
        is_same = location is not None and location.attempt_id == leftover.location.attempt_id
        return is_same and self._preserved_sandboxes.is_preserved(task)


def _group_by_task(leftovers: Iterable[Leftover]) -> dict[str, list[Leftover]]:
    by_task: dict[str, list[Leftover]] = {}
    for leftover in leftovers:
        by_task.setdefault(leftover.location.task_id, []).append(leftover)
    return by_task
