"""Finds and removes the files that killed workers of other tasks left on this host."""

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.journal import Journals, LockState
from sandbox.interfaces.placement import AttemptFiles
from sandbox.model.task_id_format import is_task_id
from sandbox.worker.task_removal import remove_tasks

_log = logging.getLogger(__name__)


class OtherTaskLeftovers:
    """The files that were left on this host by killed workers of other tasks."""

    def __init__(
        self,
        data_dir: Path,
        files: AttemptFiles,
        journals: Journals,
        lock_task: Callable[[str], contextlib.AbstractContextManager[None]],
        remove: RemovePaths,
    ) -> None:
        """lock_task: locks a task on this host; raises OSError immediately if a worker holds the lock."""
        self._data_dir = data_dir
        self._files = files
        self._journals = journals
        self._lock_task = lock_task
        self._remove = remove

    def find(self, own_task_id: str) -> Sequence[str]:
        """Return the other tasks with files on this host, including those that have a worker. Raises OSError."""
        directory = TaskLayout(self._data_dir, own_task_id).root.parent
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
        return sorted(name for name in names - {own_task_id} if is_task_id(name))

    async def remove(self, task_ids: Collection[str]) -> None:
        """Remove tasks that have ended, except those that a worker or a runner still uses.

        A worker keeps the lock of its task while a sandbox is preserved. Raises OSError, SandboxError.
        """
        with contextlib.ExitStack() as locks:
            unused = []
            for task_id in task_ids:
                try:
                    locks.enter_context(self._lock_task(task_id))
                    is_unused = self._journals.lock_state(task_id) is LockState.FREE
                except OSError:
                    is_unused = False
                if is_unused:
                    unused.append(TaskLayout(self._data_dir, task_id))
            if unused:
                _log.info("Removing the files of ended tasks: %s", ", ".join(layout.task_id for layout in unused))
                await remove_tasks(unused, self._files, self._remove)
