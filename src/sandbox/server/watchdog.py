"""Kills runners that hold their journal but no longer work: stopped by a signal, or stuck."""

import asyncio
import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import RunnerClient
from sandbox.model.limits import RUNNER_PINGS_MAX, RUNNER_SILENCE_SECONDS
from sandbox.server.tracked_task import TrackedTask

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Silence:
    """The last record, when the silence or the last ping started, and the number of unanswered pings."""

    seq: int
    started_at: float
    unanswered_count: int = 0


class RunnerWatchdog:
    """Pings silent runners. A lock proves that its holder is alive, not that it works.

    A runner's death ends its sandbox and frees its lock, so a finisher can take over.
    """

    def __init__(self, runners: RunnerClient, journals: Journals, clock: Clock) -> None:
        self._runners = runners
        self._journals = journals
        self._clock = clock
        self._silences: WeakKeyDictionary[TrackedTask, _Silence] = WeakKeyDictionary()

    async def check(self, tracked: TrackedTask) -> None:
        """Check a task whose journal is locked and silent. Called repeatedly."""
        now, seq = self._clock.monotonic(), tracked.task.last_seq
        silence = self._silences.get(tracked)
        if silence is None or silence.seq != seq:
            self._silences[tracked] = _Silence(seq, now)
            return
        if tracked.task.attempt is None or now - silence.started_at < RUNNER_SILENCE_SECONDS:
            return
        silence.started_at, attempt_id = now, tracked.task.attempt.id
        silence.unanswered_count = 0 if await self._runners.is_responsive(attempt_id) else silence.unanswered_count + 1
        if silence.unanswered_count < RUNNER_PINGS_MAX:
            return
        if await asyncio.to_thread(self._journals.kill_lock_holder, tracked.task.id):
            outcome = "killed"
        elif silence.unanswered_count == RUNNER_PINGS_MAX:
            outcome = "not killed, no runner holds its journal"
        else:
            return
        _log.error("The runner of attempt %s did not respond %s times: %s", attempt_id, RUNNER_PINGS_MAX, outcome)
