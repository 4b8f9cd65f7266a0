"""Compresses the journals of tasks that ended some time ago."""

import asyncio
import logging
from datetime import timedelta
from functools import partial

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals
from sandbox.interfaces.store import Cursor, Store, TaskQuery
from sandbox.model.fixed_limits import JOURNAL_COMPRESSION_DELAY_SECONDS
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES
from sandbox.primitives.concurrency import run_in_daemon_thread

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
            query = TaskQuery.oldest_first(FINAL_STATES, cursor)
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
