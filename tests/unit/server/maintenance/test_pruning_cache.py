"""What was measured too late for who asked serves the next one, unless that comes much later."""

import asyncio
import contextlib
import itertools
import threading

import pytest

from sandbox.model.limits import MEASUREMENT_CACHE_SECONDS
from sandbox.server.maintenance.pruning import SingleFlight


class Scene:
    def __init__(self):
        self.now, self.is_broken, self._numbers, self.may_end = 0.0, False, itertools.count(1), threading.Event()
        self.measuring = SingleFlight(self._measure, lambda: self.now)

    def _measure(self):
        self.may_end.wait(20)
        if self.is_broken:
            raise OSError("gone")
        return next(self._numbers)

    async def give_up(self):
        """Ask, wait no longer, and let the measurement end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await self.measuring.result()
        self.may_end.set()
        while not self.measuring._running.done():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("seconds", "given"), [(0, 1), (MEASUREMENT_CACHE_SECONDS, 1), (MEASUREMENT_CACHE_SECONDS + 1, 2)]
)
def test_it_is_kept_for_a_while(seconds, given):
    scene = Scene()

    async def play():
        await scene.give_up()
        scene.now += seconds
        return await scene.measuring.result()

    assert asyncio.run(play()) == given


def test_a_failure_that_nobody_heard_of_is_nobodys():
    scene = Scene()
    scene.is_broken = True

    async def play():
        await scene.give_up()
        scene.is_broken = False
        return await scene.measuring.result()

    assert asyncio.run(play()) == 1


def test_a_failure_is_told_to_who_waits_for_it():
    scene = Scene()
    scene.is_broken = True
    scene.may_end.set()
    with pytest.raises(OSError, match="gone"):
        asyncio.run(scene.measuring.result())
