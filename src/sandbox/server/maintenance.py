"""Periodic maintenance: the janitor, compression of journals, and the check of the wall clock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals
from sandbox.interfaces.store import Cursor, Store, TaskQuery
from sandbox.model.fixed_limits import (
    CLOCK_JUMP_SECONDS,
    CLOCK_TRUST_SECONDS,
    JANITOR_INTERVAL_SECONDS,
    JOURNAL_COMPRESSION_DELAY_SECONDS,
    MAINTENANCE_ACTION_TIMEOUT_SECONDS,
)
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES
from sandbox.primitives.concurrency import run_in_daemon_thread


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
