"""Ends runners that hold their journal and do nothing any more: stopped by a signal, or stuck."""

import asyncio
import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import RunnerControl
from sandbox.model.limits import RUNNER_ASKS_MAX, RUNNER_SILENCE_SECONDS
from sandbox.server.tracked_task import Feed

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Silence:
    """Since which record, since when or since when it was asked, and how often it did not answer then."""

    seq: int
    begun_at: float
    unanswered: int = 0


class Watch:
    """A lock says that its holder lives, not that it works; one that is silent is asked.

    With the runner's death its sandbox ends and its lock comes free, so that a finisher can do the rest.
    """

    def __init__(self, runners: RunnerControl, journals: Journals, clock: Clock) -> None:
        self._runners = runners
        self._journals = journals
        self._clock = clock
        self._silences: WeakKeyDictionary[Feed, _Silence] = WeakKeyDictionary()

    async def look(self, feed: Feed) -> None:
        """Called again and again while somebody holds the journal and nothing comes."""
        now, seq = self._clock.monotonic(), feed.task.last_seq
        silence = self._silences.get(feed)
        if silence is None or silence.seq != seq:
            self._silences[feed] = _Silence(seq, now)
            return
        if feed.task.attempt is None or now - silence.begun_at < RUNNER_SILENCE_SECONDS:
            return
        silence.begun_at, attempt_id = now, feed.task.attempt.id
        silence.unanswered = 0 if await self._runners.answers(attempt_id) else silence.unanswered + 1
        if silence.unanswered < RUNNER_ASKS_MAX:
            return
        if await asyncio.to_thread(self._journals.evict, feed.task.id):
            outcome = "killed"
        elif silence.unanswered == RUNNER_ASKS_MAX:
            outcome = "not killed, no runner holds its journal"
        else:
            return
        _log.error("The runner of attempt %s did not answer %s times: %s", attempt_id, RUNNER_ASKS_MAX, outcome)
