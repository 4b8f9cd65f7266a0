"""Clears away what crashes left of attempts that are over.

An attempt is this server's if it has a directory in its data directory: that is made before anything else of it, and
its log stays. It is over if its task has ended and nobody holds the journal's lock, which is taken here meanwhile. So
whoever plans, carries out, or finishes an attempt is never disturbed, however long ago they began.
"""

import asyncio
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sandbox.interfaces.disks import Remove
from sandbox.interfaces.journal import JournalDamagedError, Journals, Reading, read_task
from sandbox.interfaces.layout import AttemptLayout, TaskLayout, tasks_root
from sandbox.interfaces.placement import Leftovers
from sandbox.interfaces.store import Store
from sandbox.model.errors import SandboxError, reason_of
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS
from sandbox.model.task import Task
from sandbox.server.preserved_sandboxes import Preservation
from sandbox.system.threads import wait_in_thread

_log = logging.getLogger(__name__)


class ClearingFailedError(SandboxError):
    """Some of what was found could not be removed."""

    code = "internal_error"


@dataclass(frozen=True, slots=True)
class Rooms:
    """What clearing needs of the server."""

    data_dir: Path
    journals: Journals
    store: Store
    preservation: Preservation
    remove: Remove


class Clearing:
    """kinds: in the order in which they are ended; files go last."""

    def __init__(self, rooms: Rooms, kinds: Sequence[Leftovers]) -> None:
        self._rooms = rooms
        self._kinds = kinds

    async def clear(self) -> None:
        """Look everywhere once. What cannot be cleared keeps nothing else; raises ClearingFailedError at the end."""
        found = {kind: frozenset(await asyncio.to_thread(kind.attempt_ids)) for kind in self._kinds}
        # After the look at the machine: whoever has something there had a directory before it.
        failures: list[str] = []
        known = await asyncio.to_thread(lambda: dict(_list_attempts(self._rooms.data_dir, failures)))
        is_all_known = not failures
        for task_id, attempt_ids in _by_task(known, frozenset().union(*found.values())).items():
            try:
                failures += await self._clear_task(task_id, attempt_ids, found)
            except OSError as error:
                failures.append(f"the journal or lock of task {task_id}: {error}")
            except SandboxError as error:
                failures.append(f"task {task_id}: {error}")
        for kind in filter(lambda kind: kind.is_private and is_all_known, self._kinds):
            failures += await self._clear_nobodys(kind, found[kind] - known.keys())
        if failures:
            raise ClearingFailedError("; ".join(failures))

    async def _clear_nobodys(self, kind: Leftovers, attempt_ids: Collection[str]) -> list[str]:
        """What has no directory in a place that is this server's alone; gives what went wrong."""
        failures = []
        for attempt_id in attempt_ids:
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await kind.end(attempt_id, TaskLayout(self._rooms.data_dir, attempt_id).attempt(attempt_id))
            except (SandboxError, OSError, ValueError, TimeoutError) as error:
                failures.append(f"{kind.kind} of attempt {attempt_id}: {reason_of(error)}")
        return failures

    async def _clear_task(
        self, task_id: str, attempt_ids: Sequence[str], found: Mapping[Leftovers, Collection[str]]
    ) -> list[str]:
        """Gives what went wrong. Raises StoreError; OSError when journal or lock cannot be looked at."""
        task = await wait_in_thread(partial(self._read, task_id))
        if task is None or not task.state.is_terminal:
            return []
        failures = []
        with self._rooms.journals.holding(task_id) as is_over:
            for attempt_id in attempt_ids if is_over else ():
                try:
                    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                        await self._clear_attempt(task, attempt_id, found)
                except (SandboxError, OSError, ValueError, TimeoutError) as error:
                    failures.append(f"attempt {attempt_id} of task {task_id}: {reason_of(error)}")
        return failures

    def _read(self, task_id: str) -> Task | None:
        """By the index, or by a journal that nobody writes: when a server has just started, the index is behind."""
        indexed = self._rooms.store.load(task_id)
        if indexed is None:
            return None
        if indexed.task.state.is_terminal or self._rooms.journals.is_held(task_id):
            return indexed.task
        try:
            return read_task(self._rooms.journals, task_id, Reading(indexed.task, indexed.offset)).task
        except (JournalDamagedError, FileNotFoundError):
            return None  # whoever follows it tells

    async def _clear_attempt(self, task: Task, attempt_id: str, found: Mapping[Leftovers, Collection[str]]) -> None:
        files = TaskLayout(self._rooms.data_dir, task.id).attempt(attempt_id)
        kinds = [kind.kind for kind in self._kinds if attempt_id in found[kind]]
        if self._rooms.preservation.attempt_of(task) == attempt_id and self._rooms.preservation.is_kept(task):
            if not kinds and not files.handle.exists():
                return
            async with self._rooms.preservation.undisturbed(task) as is_alone:
                if not is_alone:
                    return
                await self._end(attempt_id, files)
                files.handle.unlink(missing_ok=True)
        else:
            await self._end(attempt_id, files)
            kept = (files.runner_log, files.handle)
            await self._rooms.remove([path for path in files.root.iterdir() if path not in kept])
            files.handle.unlink(missing_ok=True)
        _log.info("What was left of attempt %s is gone: %s", attempt_id, ", ".join([*kinds, "files"]))

    async def _end(self, attempt_id: str, files: AttemptLayout) -> None:
        """All kinds, whatever was found: a sandbox may be ended by its handle alone."""
        for kind in self._kinds:
            await kind.end(attempt_id, files)


def _list_attempts(data_dir: Path, failures: list[str]) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Every attempt's id, with its task's, and whether it has files beside its log; what cannot be read is noted.

    Text and no paths, since most of it is of tasks that ended long ago and left nothing.
    """
    layout = TaskLayout(data_dir, "")
    root, attempts, log = str(tasks_root(data_dir)), layout.attempts_root.name, layout.attempt("").runner_log.name
    for task_id in _names(root):
        try:
            for attempt_id in _names(f"{root}/{task_id}/{attempts}"):
                yield attempt_id, (task_id, _names(f"{root}/{task_id}/{attempts}/{attempt_id}") not in ([], [log]))
        except OSError as error:
            failures.append(f"the attempts of task {task_id}: {error}")


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  (a hot path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _by_task(known: Mapping[str, tuple[str, bool]], found: Collection[str]) -> Mapping[str, Sequence[str]]:
    """The attempts of which something is there, by their tasks."""
    tasks: dict[str, list[str]] = {}
    for attempt_id, (task_id, has_files) in known.items():
        if has_files or attempt_id in found:
            tasks.setdefault(task_id, []).append(attempt_id)
    return tasks
