"""Journals whose writers are on a host that is not responding."""

from contextlib import contextmanager

from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.journal.journals import FileJournals


class UnreachableJournals(FileJournals):
    """Implements `Journals`. While `is_unknown` is set, each writer's lock state is UNKNOWN. Reads are not affected."""

    is_unknown = True

    def lock_state(self, task_id):
        return LockState.UNKNOWN if self.is_unknown else super().lock_state(task_id)

    def open(self, task_id):
        self._check(task_id)
        return super().open(task_id)

    def compress(self, task_id):
        self._check(task_id)
        super().compress(task_id)

    @contextmanager
    def try_lock(self, task_id):
        if self.is_unknown:
            yield False
            return
        with super().try_lock(task_id) as has_lock:
            yield has_lock

    def _check(self, task_id):
        if self.is_unknown:
            raise JournalBusyError(f"The host that runs the writer of {task_id} is not responding.")
