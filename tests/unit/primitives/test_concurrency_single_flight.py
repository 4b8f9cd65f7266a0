"""A measurement that finishes after its caller timed out is cached for later callers."""

import asyncio
import contextlib
import itertools
import threading

import pytest

from sandbox.model.fixed_limits import UNUSED_DISK_MEASUREMENT_SECONDS_MAX
from sandbox.primitives.concurrency import SingleFlight


class SlowMeasurement:
    def __init__(self):
        self.now, self.is_broken, self._numbers, self.release_measurement = (
            0.0,
            False,
            itertools.count(1),
            threading.Event(),
        )
        self.cache = SingleFlight(self._measure, UNUSED_DISK_MEASUREMENT_SECONDS_MAX, lambda: self.now)

    def _measure(self):
        self.release_measurement.wait(20)
        if self.is_broken:
            raise OSError("gone")
        return next(self._numbers)

    async def time_out(self):
        """Request a result, time out, and let the measurement finish."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await self.cache.result()
        self.release_measurement.set()
        while not self.cache._running.done():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 1), (UNUSED_DISK_MEASUREMENT_SECONDS_MAX, 1), (UNUSED_DISK_MEASUREMENT_SECONDS_MAX + 1, 2)],
)
async def test_result_is_cached_for_a_limited_time(seconds, expected):
    measurement = SlowMeasurement()

    async def run():
        await measurement.time_out()
        measurement.now += seconds
        return await measurement.cache.result()

    assert (await run()) == expected


async def test_failure_without_a_waiter_is_not_cached():
    measurement = SlowMeasurement()
    measurement.is_broken = True

    async def run():
        await measurement.time_out()
        measurement.is_broken = False
        return await measurement.cache.result()

    assert (await run()) == 1


async def test_failure_is_raised_to_the_waiter():
    measurement = SlowMeasurement()
    measurement.is_broken = True
    measurement.release_measurement.set()
    with pytest.raises(OSError, match="gone"):
        await measurement.cache.result()
