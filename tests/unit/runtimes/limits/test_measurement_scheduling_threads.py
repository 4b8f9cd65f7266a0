"""A program that makes a measurement wait for a lock cannot prolong the measurement, nor end another sandbox."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from doubles.deployment import wait_until
from sandbox.runtimes.limits.measurement_scheduling import (
    BlockedThreadDetector,
    OtherSandboxMeasurement,
    measure_in_thread,
    run_observed_thread,
    start_measurement,
)


class Lock:
    """Simulates a kernel lock: a thread that takes the lock sleeps in a system call until the lock is released."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def take(self) -> None:
        os.read(self._reader, 1)

    def release(self) -> None:
        os.write(self._writer, b"xxxx")


@pytest.fixture
def lock() -> Iterator[Lock]:
    """A lock that is released after the test."""
    lock = Lock()
    yield lock
    lock.release()


def observe(work: Callable[[], object], end: Callable[[], object]) -> list[bool]:
    """Run the work in a measurement. Return whether its thread slept in each of the last three intervals."""

    async def run() -> list[bool]:
        measurement, sleep = start_measurement(lambda: measure_in_thread(work))
        try:
            async with asyncio.timeout(20):
                while sleep.thread_id is None:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            found = []
            for _ in range(4):
                found.append(sleep.has_stayed_blocked())
                await asyncio.sleep(0.1)
            return found[1:]
        finally:
            end()
            await measurement

    return asyncio.run(run())


def test_thread_that_waits_for_a_lock_of_the_kernel_sleeps(lock: Lock):
    assert observe(lock.take, lock.release) == [True, True, True]


def test_additional_thread_of_a_measurement_is_observed(lock: Lock):
    def work() -> None:
        run_observed_thread(threading.Thread(target=lock.take, daemon=True))

    assert observe(work, lock.release) == [True, True, True]


def test_thread_that_waits_for_another_thread_does_not_sleep():
    """A thread waits for Python's own lock in the same way."""
    ended = threading.Event()
    assert observe(lambda: ended.wait(20), ended.set) == [False, False, False]


def test_thread_that_runs_between_short_waits_does_not_sleep():
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            time.sleep(0.005)

    assert observe(work, ended.set) == [False, False, False]


def test_thread_that_has_not_started_does_not_sleep():
    sleep = BlockedThreadDetector()
    assert not sleep.has_stayed_blocked()
    assert not sleep.has_stayed_blocked()


def test_work_outside_a_measurement_runs_too():
    done: list[str] = []

    def work() -> str:
        run_observed_thread(threading.Thread(target=done.append, args=["further"]))
        return "done"

    assert asyncio.run(measure_in_thread(work)) == "done"
    assert done == ["further"]


def test_other_sandboxes_are_measured():
    assert OtherSandboxMeasurement[int](sum, seconds=20).measure_all([[1], [2, 3], []]) == [1, 5, 0]


def test_sandbox_that_cannot_be_measured_delays_only_its_first_measurement(lock: Lock):
    blocked = [True]

    def measure(process_ids: Collection[int]) -> int:
        if 1 in process_ids and blocked[0]:
            lock.take()
        return len(process_ids)

    measurement = OtherSandboxMeasurement(measure, seconds=0.2)
    sandboxes = [[6], [1, 2], [4, 5]]
    wait_until(lambda: measurement.measure_all(sandboxes)[1] is None)
    started_at = time.monotonic()
    wait_until(lambda: measurement.measure_all(sandboxes) == [1, None, 2])
    assert all(measurement.measure_all([[1, 3]]) == [None] for _ in range(50))
    assert time.monotonic() - started_at < 5
    blocked[0] = False
    lock.release()
    wait_until(lambda: measurement.measure_all(sandboxes) == [1, 2, 2])


def test_measurement_of_another_sandbox_is_unknown_if_the_machine_has_too_many_threads(monkeypatch: pytest.MonkeyPatch):
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert OtherSandboxMeasurement[int](sum).measure_all([[1]]) == [None]
