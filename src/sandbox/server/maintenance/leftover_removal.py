"""Removes the leftovers of attempts that are over, for example after a crash.

An attempt belongs to this server if it has a directory in the data directory of the server or of the attempt's
placement: the directory is created before any other part of the attempt, and the log in it is kept. An attempt is over
if its task has ended and no process holds the journal's lock, which the leftover remover holds while it removes
leftovers. So an attempt that is being planned, run or finished is never disturbed, however long ago it started.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial

from sandbox.interfaces.journal import JournalDamagedError, Journals, LockState, ReplayState
from sandbox.interfaces.placement import AttemptFiles, Leftover
from sandbox.interfaces.store import Store
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.task import Task
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.preserved_sandboxes import PreservedSandboxes

_log = logging.getLogger(__name__)


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
