"""Kills runners that do not respond."""

import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sandbox.interfaces.clock import Clock
from sandbox.model.fixed_limits import RUNNER_PINGS_MAX, RUNNER_SILENCE_SECONDS
from sandbox.server.tracked_task import JournalOwner, RunnerOwned, TrackedTask

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Silence:
    """A silent journal. started_at: the start of the silence, or the time of the last ping."""

    owner: JournalOwner
    seq: int
    started_at: float
    unanswered_count: int = 0


class RunnerWatchdog:
    """Pings silent runners. A lock proves that its holder is alive, not that the holder is working.

    A runner's death ends its sandbox and frees its lock, so a finisher can take over.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._silences: WeakKeyDictionary[TrackedTask, _Silence] = WeakKeyDictionary()

    async def check(self, tracked: TrackedTask) -> None:
        """Check a task whose journal is held but has no new records. Call it periodically."""
        now, owner, seq = self._clock.monotonic(), tracked.owner, tracked.task.last_seq
        silence = self._silences.get(tracked)
        if silence is None or silence.owner is not owner or silence.seq != seq:
            self._silences[tracked] = _Silence(owner, seq, now)
            return
        if not isinstance(owner, RunnerOwned) or now - silence.started_at < RUNNER_SILENCE_SECONDS:
            return
        silence.started_at, runner = now, owner.runner
        silence.unanswered_count = 0 if await runner.is_responsive() else silence.unanswered_count + 1
        if silence.unanswered_count < RUNNER_PINGS_MAX:
            return
        if await runner.kill():
            outcome = "killed"
        elif silence.unanswered_count == RUNNER_PINGS_MAX:
            outcome = "not killed, because no runner holds its journal"
        else:
            return
        _log.error(
            "The runner of attempt %s did not respond %s times: %s", runner.attempt_id, RUNNER_PINGS_MAX, outcome
        )
