"""Work waits for a runner's CPU budget in order of arrival. Priority work overtakes other work."""

import asyncio

import pytest

from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS
from sandbox.system.cpu_throttle import CpuThrottle


class FakeProcess:
    """A process with a throttle; the test sets the clocks."""

    def __init__(self):
        self.now = self.used = 0.0
        self.throttle = CpuThrottle(lambda: self.now, lambda: self.used)

    async def tick(self):
        """Give all waiters time to check again."""
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)


@pytest.fixture
def process(monkeypatch):
    original_sleep = asyncio.sleep
    monkeypatch.setattr("sandbox.system.cpu_throttle.asyncio.sleep", lambda seconds: original_sleep(min(seconds, 0.02)))
    return FakeProcess()


def test_work_within_the_budget_does_not_wait(process):
    async def run():
        async with asyncio.timeout(5):
            await asyncio.gather(*(process.throttle.queue().wait() for _ in range(100)))

    asyncio.run(run())


def test_cpu_used_before_start_is_not_debt(process):
    """Before the start, the same process may have relayed a large clone."""

    async def run():
        process.used = 100.0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await process.throttle.queue().wait()
        process.throttle.start()
        async with asyncio.timeout(5):
            await process.throttle.queue().wait()

    asyncio.run(run())


def test_priority_queue_overtakes_waiters(process):
    async def run():
        done = []
        common, preferred = process.throttle.queue(), process.throttle.queue(debt_seconds=1.0)

        async def enter_queue(queue, name):
            async with queue:
                done.append(name)

        process.used = RUNNER_CPU_BURST_SECONDS + 0.5
        tasks = [asyncio.create_task(enter_queue(common, number)) for number in range(3)]
        await process.tick()
        tasks.append(asyncio.create_task(enter_queue(preferred, "preferred")))
        await process.tick()
        assert done == ["preferred"]
        process.now = 100.0
        await asyncio.gather(*tasks)
        assert done == ["preferred", 0, 1, 2]

    asyncio.run(run())


def test_cancelled_waiter_does_not_block_others(process):
    async def run():
        queue = process.throttle.queue()
        process.used = RUNNER_CPU_BURST_SECONDS + 0.5
        first, second = (asyncio.create_task(queue.wait()) for _ in range(2))
        await process.tick()
        first.cancel()
        await process.tick()
        process.now = 100.0
        async with asyncio.timeout(5):
            await second
        assert first.cancelled()

    asyncio.run(run())
