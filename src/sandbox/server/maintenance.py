"""Periodic maintenance: the janitor, compression of journals, removal of leftovers, and the check of the wall clock.

An attempt belongs to this server if it has a directory in the data directory of the server or of the attempt's
placement: the directory is created before any other part of the attempt, and the log in it is kept. An attempt has
ended if its task has ended and no process holds the journal's lock. The leftover remover holds this lock while it
removes leftovers, so it never disturbs an attempt that is being planned, run or finished.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals, LockState, ReplayState
from sandbox.interfaces.placement import AttemptFiles, Leftover
from sandbox.interfaces.store import Cursor, Store, TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout, tasks_root
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import (
    CLOCK_JUMP_SECONDS,
    CLOCK_TRUST_SECONDS,
    JANITOR_INTERVAL_SECONDS,
    JOURNAL_COMPRESSION_DELAY_SECONDS,
    MAINTENANCE_ACTION_TIMEOUT_SECONDS,
    SANDBOX_TEARDOWN_SECONDS,
)
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.model.task_state import FINAL_STATES
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.derived_tasks import discard_inheritance, has_own_artifacts
from sandbox.server.preserved_sandboxes import PreservedSandboxes


class WallClockCheck:
    """Trusts the wall clock once it has not jumped for CLOCK_TRUST_SECONDS.

    A host may boot with its clock months ahead, until a time server corrects the clock. The clock is not checked for
    data that is kept for less than CLOCK_TRUST_SECONDS.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reset()

    def is_trusted(self, age_seconds: float) -> bool:
        """Return whether data older than `age_seconds`, by the wall clock, may be removed.

        Detects clock jumps between calls.
        """
        steady_seconds = self._clock.monotonic() - self._steady_since_monotonic
        passed_seconds = (self._clock.now() - self._steady_since).total_seconds()
        if abs(passed_seconds - steady_seconds) > CLOCK_JUMP_SECONDS:
            self._reset()
            steady_seconds = 0.0
        return age_seconds < CLOCK_TRUST_SECONDS or steady_seconds >= CLOCK_TRUST_SECONDS

    def _reset(self) -> None:
        self._steady_since_monotonic, self._steady_since = self._clock.monotonic(), self._clock.now()


_FAILURES_SHOWN_MAX = 5
_log = logging.getLogger(__name__)


class JournalCompressor:
    """Compresses journals JOURNAL_COMPRESSION_DELAY_SECONDS after the task's end. Recent tasks are read most often."""

    def __init__(self, journals: Journals, store: Store, clock: Clock) -> None:
        self._journals = journals
        self._store = store
        self._clock = clock
        self._compressed_until: Cursor | None = None
        self._damaged: set[str] = set()

    async def sweep(self) -> None:
        """Compress all due journals, in the order in which the tasks ended.

        A disk error in one journal does not stop the others. A journal in use is left for the next run. Raises
        StoreError; raises OSError at the end if a journal could not be compressed.
        """
        failures: list[str] = []
        await self._sweep(failures)
        if failures:
            raise OSError("; ".join(failures[:_FAILURES_SHOWN_MAX]))

    async def _sweep(self, failures: list[str]) -> None:
        ended_before = self._clock.now() - timedelta(seconds=JOURNAL_COMPRESSION_DELAY_SECONDS)
        cursor, is_busy = self._compressed_until, False
        while True:
            query = TaskQuery.least_recently_changed_first(FINAL_STATES, cursor)
            page = await asyncio.to_thread(self._store.query, query)
            for task in page.tasks:
                if task.state_changed_at > ended_before:
                    return
                try:
                    # A compression may take longer than the server's shutdown allows. If it is interrupted, it starts
                    # over later.
                    is_busy |= not await run_in_daemon_thread(partial(self._compress, task))
                except OSError as error:
                    failures.append(f"journal of task {task.id}: {error.strerror or error}")
            if page.next_cursor is None:
                return
            cursor = page.next_cursor
            self._compressed_until = self._compressed_until if failures or is_busy else cursor

    def _compress(self, task: Task) -> bool:
        """Return False if the compression must be retried. A damaged journal is logged once per server process."""
        if task.id in self._damaged:
            return True
        try:
            self._journals.compress(task.id)
        except JournalBusyError:
            return False
        except FileNotFoundError:
            return True
        except JournalDamagedError as error:
            self._damaged.add(task.id)
            _log.error("The journal of task %s is left uncompressed: %s", task.id, error, extra={"task_id": task.id})
        return True


@dataclass(frozen=True, slots=True)
class MaintenanceAction:
    """An action of the janitor. It may be cancelled at any await; its next run must then do the rest of the work.

    name: what the action removes or changes, for operators.
    remedy: what operators can do if it fails.
    """

    name: str
    run: Callable[[], Awaitable[None]]
    remedy: str


class Janitor:
    """Runs its actions one after the other. A failed action does not stop the others."""

    def __init__(self, actions: Sequence[MaintenanceAction]) -> None:
        self._actions = actions

    async def run(self) -> None:
        """Run all actions now, and again after each JANITOR_INTERVAL_SECONDS."""
        while True:
            await self.run_once()
            await asyncio.sleep(JANITOR_INTERVAL_SECONDS)

    async def run_once(self) -> None:
        """Run every action once. Failures are only logged."""
        for action in self._actions:
            try:
                async with asyncio.timeout(MAINTENANCE_ACTION_TIMEOUT_SECONDS):
                    await action.run()
            except Exception as error:
                reason = str(error) or type(error).__name__
                again = f"retrying in {JANITOR_INTERVAL_SECONDS / 60:.0f} minutes"
                _log.error("Maintenance of %s failed: %s; %s. %s", action.name, reason, again, action.remedy)


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
