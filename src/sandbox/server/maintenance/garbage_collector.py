"""Removes leftovers of crashed attempts that are over.

An attempt belongs to this server if it has a directory in the server's data directory: the directory is created before
anything else of the attempt, and its log stays. An attempt is over if its task has ended and no process holds the
journal's lock, which the garbage collector holds while it removes leftovers. So an attempt that is being planned, run
or finished is never disturbed, however long ago it started.
"""

import asyncio
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import AttemptLayout, TaskLayout, tasks_root
from sandbox.interfaces.journal import JournalDamagedError, Journals, Liveness, ReplayState
from sandbox.interfaces.placement import LeftoverSource
from sandbox.interfaces.store import Store
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.task import Task
from sandbox.server.preserved_sandboxes import PreservedSandboxes
from sandbox.system.daemon_thread import run_in_daemon_thread

_log = logging.getLogger(__name__)


class GarbageCollectionError(SandboxError):
    """Some leftovers could not be removed."""

    code = "internal_error"


class GarbageCollector:
    """Removes leftovers. leftover_sources: in the order of their removal; files are removed last."""

    def __init__(
        self,
        data_dir: Path,
        journals: Journals,
        store: Store,
        preserved_sandboxes: PreservedSandboxes,
        remove: RemovePaths,
        leftover_sources: Sequence[LeftoverSource],
    ) -> None:
        self._data_dir = data_dir
        self._journals = journals
        self._store = store
        self._preserved_sandboxes = preserved_sandboxes
        self._remove = remove
        self._leftover_sources = leftover_sources

    async def sweep(self) -> None:
        """Scan everything once. A failure does not stop the rest; raises GarbageCollectionError at the end."""
        leftovers = {
            source: frozenset(await asyncio.to_thread(source.attempt_ids)) for source in self._leftover_sources
        }
        # Scan the directories after the host: the directory of an attempt is older than its leftovers.
        failures: list[str] = []
        attempts = await asyncio.to_thread(lambda: dict(_list_attempts(self._data_dir, failures)))
        is_all_known = not failures
        for task_id, attempt_ids in _group_by_task(attempts, frozenset().union(*leftovers.values())).items():
            try:
                failures += await self._sweep_task(task_id, attempt_ids, leftovers)
            except OSError as error:
                failures.append(f"the journal or lock of task {task_id}: {error}")
            except SandboxError as error:
                failures.append(f"task {task_id}: {error}")
        for source in filter(lambda source: source.is_exclusive and is_all_known, self._leftover_sources):
            failures += await self._sweep_unowned(source, leftovers[source] - attempts.keys())
        if failures:
            raise GarbageCollectionError("; ".join(failures))

    async def _sweep_unowned(self, source: LeftoverSource, attempt_ids: Collection[str]) -> list[str]:
        """Remove leftovers without an attempt directory from a location that only this server uses. Return failures."""
        failures = []
        for attempt_id in attempt_ids:
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await source.clean_up(attempt_id, TaskLayout(self._data_dir, attempt_id).attempt(attempt_id))
            except (SandboxError, OSError, ValueError, TimeoutError) as error:
                failures.append(f"{source.kind} of attempt {attempt_id}: {error_reason(error)}")
        return failures

    async def _sweep_task(
        self, task_id: str, attempt_ids: Sequence[str], leftovers: Mapping[LeftoverSource, Collection[str]]
    ) -> list[str]:
        """Remove one task's leftovers; return failures. Raises StoreError; OSError if journal or lock is unreadable."""
        task = await run_in_daemon_thread(partial(self._load_task, task_id))
        if task is None or not task.state.is_final:
            return []
        failures = []
        with self._journals.try_lock(task_id) as has_lock:
            for attempt_id in attempt_ids if has_lock else ():
                try:
                    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                        await self._sweep_attempt(task, attempt_id, leftovers)
                except (SandboxError, OSError, ValueError, TimeoutError) as error:
                    failures.append(f"attempt {attempt_id} of task {task_id}: {error_reason(error)}")
        return failures

    def _load_task(self, task_id: str) -> Task | None:
        """Load from the index, or from a FREE journal: right after the server's start the index is behind."""
        indexed = self._store.load(task_id)
        if indexed is None:
            return None
        if indexed.task.state.is_final or self._journals.liveness(task_id) is not Liveness.FREE:
            return indexed.task
        try:
            return self._journals.replay(task_id, ReplayState(indexed.task, indexed.offset)).task
        except (JournalDamagedError, FileNotFoundError):
            return None  # the tailer reports it

    async def _sweep_attempt(
        self, task: Task, attempt_id: str, leftovers: Mapping[LeftoverSource, Collection[str]]
    ) -> None:
        files = TaskLayout(self._data_dir, task.id).attempt(attempt_id)
        kinds = [source.kind for source in self._leftover_sources if attempt_id in leftovers[source]]
        if self._preserved_sandboxes.disk_attempt_id(task) == attempt_id and self._preserved_sandboxes.is_preserved(
            task
        ):
            if not kinds and not files.handle.exists():
                return
            async with self._preserved_sandboxes.exclusive(task) as is_exclusive:
                if not is_exclusive:
                    return
                await self._clean_up_leftovers(attempt_id, files)
                files.handle.unlink(missing_ok=True)
        else:
            await self._clean_up_leftovers(attempt_id, files)
            preserved = (files.runner_log, files.handle)
            await self._remove([path for path in files.root.iterdir() if path not in preserved])
            files.handle.unlink(missing_ok=True)
        _log.info("Removed the leftovers of attempt %s: %s", attempt_id, ", ".join([*kinds, "files"]))

    async def _clean_up_leftovers(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Clean up leftovers of every kind, whatever was found: a handle alone may be enough to end a sandbox."""
        for source in self._leftover_sources:
            await source.clean_up(attempt_id, layout)


def _list_attempts(data_dir: Path, failures: list[str]) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield every attempt's id with its task id and whether it has files besides its log. Read errors are collected.

    Uses strings instead of paths for speed: most attempts ended long ago and left nothing.
    """
    layout = TaskLayout(data_dir, "")
    root, attempts, log = str(tasks_root(data_dir)), layout.attempts_root.name, layout.attempt("").runner_log.name
    for task_id in _list_names(root):
        try:
            for attempt_id in _list_names(f"{root}/{task_id}/{attempts}"):
                yield attempt_id, (task_id, _list_names(f"{root}/{task_id}/{attempts}/{attempt_id}") not in ([], [log]))
        except OSError as error:
            failures.append(f"the attempts of task {task_id}: {error}")


def _list_names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  (a hot path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _group_by_task(
    attempts: Mapping[str, tuple[str, bool]], attempt_ids: Collection[str]
) -> Mapping[str, Sequence[str]]:
    """Group the attempts that have leftovers by task."""
    tasks: dict[str, list[str]] = {}
    for attempt_id, (task_id, has_files) in attempts.items():
        if has_files or attempt_id in attempt_ids:
            tasks.setdefault(task_id, []).append(attempt_id)
    return tasks
