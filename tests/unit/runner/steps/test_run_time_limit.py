"""A time limit ends an agent that hangs or runs too long."""

import pytest

from sandbox.model.failure import FailureCode
from sandbox.model.manifest.schema import Lifecycle
from sandbox.runner.steps.run import TimeLimit


class SteppedClock:
    """A monotonic clock that advances with each sleep."""

    def __init__(self, monkeypatch):
        self.seconds, self.on_sleep = 0.0, lambda: None
        monkeypatch.setattr("sandbox.runner.steps.run.asyncio.sleep", self.sleep)

    def monotonic(self):
        return self.seconds

    async def sleep(self, seconds):
        self.seconds += seconds
        self.on_sleep()


@pytest.fixture
def stepped_clock(monkeypatch):
    return SteppedClock(monkeypatch)


LIFECYCLE = Lifecycle(timeout="60s", hang_timeout="10s")


async def test_silent_agent_is_reported_as_hanging_after_the_hang_timeout(stepped_clock):
    failure = await TimeLimit(LIFECYCLE, stepped_clock, lambda: False).watch(60)
    assert (failure.code, stepped_clock.seconds) == (FailureCode.HANG, 10)


@pytest.mark.parametrize("is_busy", [True, False])
async def test_active_or_busy_agent_times_out_when_no_time_remains(stepped_clock, is_busy):
    limit = TimeLimit(LIFECYCLE, stepped_clock, lambda: is_busy)
    if not is_busy:
        stepped_clock.on_sleep = limit.record_activity
    failure = await limit.watch(45)
    assert (failure.code, stepped_clock.seconds) == (FailureCode.TIMEOUT, 45)


async def test_hang_timeout_restarts_with_each_output(stepped_clock):
    limit = TimeLimit(LIFECYCLE, stepped_clock, lambda: False)
    stepped_clock.on_sleep = lambda: limit.record_activity() if stepped_clock.seconds == 7 else None
    assert (await limit.watch(60)).code is FailureCode.HANG
    assert stepped_clock.seconds == 17
