"""Queues for a runner's CPU: in the order of coming, and those with priority past those without."""

import asyncio

import pytest

from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS
from sandbox.system.cpu_throttle import CpuThrottle


class Played:
    """A process whose clocks are set by hand."""

    def __init__(self):
        self.now = self.used = 0.0
        self.throttle = CpuThrottle(lambda: self.now, lambda: self.used)

    async def tick(self):
        """Long enough for everybody who waits to look again."""
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)


@pytest.fixture
def played(monkeypatch):
    real = asyncio.sleep
    monkeypatch.setattr("sandbox.system.cpu_throttle.asyncio.sleep", lambda seconds: real(min(seconds, 0.02)))
    return Played()


def test_nobody_waits_while_there_is_budget(played):
    async def story():
        async with asyncio.timeout(5):
            await asyncio.gather(*(played.throttle.queue().wait() for _ in range(100)))

    asyncio.run(story())


def test_what_the_runner_used_before_the_agent_began_is_no_debt(played):
    """A large clone is relayed by the same process."""

    async def story():
        played.used = 100.0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await played.throttle.queue().wait()
        played.throttle.start()
        async with asyncio.timeout(5):
            await played.throttle.queue().wait()

    asyncio.run(story())


def test_priority_passes_what_waits_and_everybody_goes_on_once_it_is_paid(played):
    async def story():
        done = []
        common, preferred = played.throttle.queue(), played.throttle.queue(debt_seconds=1.0)

        async def go(queue, name):
            async with queue:
                done.append(name)

        played.used = RUNNER_CPU_BURST_SECONDS + 0.5
        tasks = [asyncio.create_task(go(common, number)) for number in range(3)]
        await played.tick()
        tasks.append(asyncio.create_task(go(preferred, "preferred")))
        await played.tick()
        assert done == ["preferred"]
        played.now = 100.0
        await asyncio.gather(*tasks)
        assert done == ["preferred", 0, 1, 2]

    asyncio.run(story())


def test_who_leaves_while_it_waits_keeps_nobody_waiting(played):
    async def story():
        queue = played.throttle.queue()
        played.used = RUNNER_CPU_BURST_SECONDS + 0.5
        first, second = (asyncio.create_task(queue.wait()) for _ in range(2))
        await played.tick()
        first.cancel()
        await played.tick()
        played.now = 100.0
        async with asyncio.timeout(5):
            await second
        assert first.cancelled()

    asyncio.run(story())
