"""Work waits for a runner's CPU budget in order of arrival. Priority work overtakes other work."""

import asyncio

import pytest

from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS
from sandbox.primitives.runner_cpu_throttle import CpuThrottle


class ThrottleHarness:
    """A throttle whose clocks the test sets."""

    def __init__(self):
        self.now = self.used = 0.0
        self.throttle = CpuThrottle(lambda: self.now, lambda: self.used)

    async def let_waiters_check(self):
        """Give all waiters time to check the budget again."""
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)


@pytest.fixture
def harness(monkeypatch):
    original_sleep = asyncio.sleep
    monkeypatch.setattr(
        "sandbox.primitives.runner_cpu_throttle.asyncio.sleep", lambda seconds: original_sleep(min(seconds, 0.02))
    )
    return ThrottleHarness()


async def test_work_within_the_budget_does_not_wait(harness):
    async with asyncio.timeout(5):
        await asyncio.gather(*(harness.throttle.queue().wait() for _ in range(100)))


async def test_cpu_time_used_before_the_start_does_not_count_as_debt(harness):
    """The same process may have relayed a large clone before the throttle was started."""
    harness.used = 100.0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await harness.throttle.queue().wait()
    harness.throttle.start()
    async with asyncio.timeout(5):
        await harness.throttle.queue().wait()


async def test_preferred_queue_overtakes_other_waiters(harness):
    done = []
    common, preferred = harness.throttle.queue(), harness.throttle.queue(debt_seconds=1.0)

    async def enter_queue(queue, name):
        async with queue:
            done.append(name)

    harness.used = RUNNER_CPU_BURST_SECONDS + 0.5
    tasks = [asyncio.create_task(enter_queue(common, number)) for number in range(3)]
    await harness.let_waiters_check()
    tasks.append(asyncio.create_task(enter_queue(preferred, "preferred")))
    await harness.let_waiters_check()
    assert done == ["preferred"]
    harness.now = 100.0
    await asyncio.gather(*tasks)
    assert done == ["preferred", 0, 1, 2]


async def test_cancelled_waiter_does_not_block_others(harness):
    queue = harness.throttle.queue()
    harness.used = RUNNER_CPU_BURST_SECONDS + 0.5
    first, second = (asyncio.create_task(queue.wait()) for _ in range(2))
    await harness.let_waiters_check()
    first.cancel()
    await harness.let_waiters_check()
    harness.now = 100.0
    async with asyncio.timeout(5):
        await second
    assert first.cancelled()
