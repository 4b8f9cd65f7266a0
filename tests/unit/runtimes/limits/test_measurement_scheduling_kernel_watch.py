"""A sandbox must end if it uses too many of the host kernel's resources, or if the usage cannot be measured."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from sandbox.model.fixed_limits import EARLY_COUNT_MEMORY_GROWTH_BYTES
from sandbox.runtimes.limits.measurement_scheduling import measure_in_thread, wait_for_exceeded_limit
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage


async def watch(sandbox):
    return await wait_for_exceeded_limit(
        sandbox.kernel_usage, sandbox.basic_file_usage, sandbox.detailed_file_usage, sandbox.kernel_bytes_outside_cgroup
    )


class ScriptedSandbox:
    """A sandbox with scripted kernel usage. The last usage is repeated."""

    def __init__(self, *usages, files=FileUsage(), open_files=FileUsage(), delay_seconds=0.0):  # noqa: B008
        self.usages = list(usages)
        self.files, self.open_files = files, open_files
        self.delay_seconds = delay_seconds
        self.detailed_counts = self.counts = 0
        self.count_seconds, self.uncharged = 0.0, None

    def kernel_bytes_outside_cgroup(self):
        return self.uncharged

    async def kernel_usage(self):
        return self.usages.pop(0) if len(self.usages) > 1 else self.usages[0]

    async def basic_file_usage(self):
        self.counts += 1
        await asyncio.sleep(self.count_seconds)
        return self.open_files

    async def detailed_file_usage(self):
        self.detailed_counts += 1
        await asyncio.sleep(self.delay_seconds)
        return self.files


def watch_until_exceeded(monkeypatch, *usages):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.KERNEL_USAGE_CHECK_INTERVAL_SECONDS", 0.001)

    async def run():
        async with asyncio.timeout(10):
            return await watch(ScriptedSandbox(*usages))

    return asyncio.run(run())


def test_socket_count_over_the_limit_is_a_violation(monkeypatch):
    violation = watch_until_exceeded(monkeypatch, KernelUsage(10), KernelUsage(8192), KernelUsage(8193))
    assert violation.partition(". ")[0] == "The sandbox had 8193 sockets; the limit is 8192"


def test_socket_buffers_over_the_limit_are_a_violation(monkeypatch):
    at, over = KernelUsage(10, 64 << 20, 64 << 20), KernelUsage(10, 65 << 20, 64 << 20)
    violation = watch_until_exceeded(monkeypatch, KernelUsage(10, 1 << 40, None), at, over)
    assert "held 65 MiB in their buffers; the limit is 64 MiB. Read received data, or raise vm.memory." in violation


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (FileUsage(131_073), "had 131073 open files; the limit is 131072"),
        (FileUsage(9000, directories=8193), "more than 8192 open directories"),
        (FileUsage(9000, posix_locks=8193), "had 8193 locks on files; the limit is 8192"),
    ],
)
async def test_open_files_or_directories_or_locks_over_the_limit_are_a_violation(files, reason):
    async with asyncio.timeout(10):
        assert reason in await watch(ScriptedSandbox(KernelUsage(), files=files))


def watch_files(sandbox, seconds=10):
    async def run():
        async with asyncio.timeout(seconds):
            return await watch(sandbox)

    return asyncio.run(run())


def test_hanging_count_does_not_delay_the_count_of_open_files():
    hanging = ScriptedSandbox(KernelUsage(), open_files=FileUsage(9000, directories=8193), delay_seconds=60)
    assert "more than 8192 open directories" in watch_files(hanging)


def test_hanging_count_is_a_violation(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling._WAIT_SECONDS", 0.01)
    assert "could not be counted within 5 s" in watch_files(ScriptedSandbox(KernelUsage(), delay_seconds=60))


def watch_slow_count_on_a_busy_machine(monkeypatch, **delays):
    """Watch a sandbox whose counts take 1 s. delays: the run delay of each thread, by the seconds since the start."""
    watched, started_at = "sandbox.runtimes.limits.measurement_scheduling.", time.monotonic()
    monkeypatch.setattr(f"{watched}_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(f"{watched}_WAITED_SECONDS_MAX", 0.5)
    monkeypatch.setattr(
        f"{watched}read_run_delays",
        lambda: {thread: delay(time.monotonic() - started_at) for thread, delay in delays.items()},
    )
    return watch_files(ScriptedSandbox(KernelUsage(), delay_seconds=1.0), seconds=3)


BUSY_MACHINES = {
    "one thread waits": {"idle": lambda elapsed: 0.0, "waiting": lambda elapsed: elapsed * 0.95},
    "threads take turns": dict.fromkeys("abc", lambda elapsed: elapsed * 0.3),
    "waits are visible at their end": {"waiting": lambda elapsed: elapsed // 0.3 * 0.3},
}


@pytest.mark.parametrize("delays", BUSY_MACHINES.values(), ids=BUSY_MACHINES)
def test_count_that_waits_for_a_processor_is_not_a_violation(monkeypatch, delays):
    with pytest.raises(TimeoutError):
        watch_slow_count_on_a_busy_machine(monkeypatch, **delays)


def test_wait_for_a_processor_at_the_beginning_of_a_count_is_not_a_violation(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling._WAIT_SECONDS", 0.2)
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling._WAITED_SECONDS_MAX", 0.9)

    class WaitingSandbox(ScriptedSandbox):
        delays = {"waiting": 0.0}  # noqa: RUF012  (one test has one sandbox)

        async def detailed_file_usage(self):
            self.detailed_counts += 1
            if self.detailed_counts == 1:
                await asyncio.sleep(0.1)
                self.delays["waiting"] = 0.2
                await asyncio.sleep(0.9)
            return self.files

    sandbox = WaitingSandbox(KernelUsage())
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.read_run_delays", lambda: dict(sandbox.delays))
    with pytest.raises(TimeoutError):
        watch_files(sandbox, seconds=2)
    assert sandbox.detailed_counts > 1


def test_delays_before_a_count_do_not_extend_it(monkeypatch):
    assert "could not be counted" in watch_slow_count_on_a_busy_machine(monkeypatch, waiting=lambda elapsed: 1000.0)


def test_count_that_takes_too_long_on_a_machine_with_free_processors_is_a_violation(monkeypatch):
    assert "could not be counted" in watch_slow_count_on_a_busy_machine(
        monkeypatch, waiting=lambda elapsed: elapsed * 0.05
    )


def test_delays_of_other_threads_do_not_extend_a_count_forever(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling._WAITS_MAX", 10)
    assert "could not be counted" in watch_slow_count_on_a_busy_machine(
        monkeypatch, waiting=lambda elapsed: elapsed * 100
    )


@pytest.mark.parametrize("sleeps", [True, False])
def test_delays_do_not_extend_a_count_that_waits_for_a_lock_of_the_kernel(monkeypatch, sleeps):
    """A program inside can keep all processors busy while it holds the lock."""
    watched = "sandbox.runtimes.limits.measurement_scheduling."
    monkeypatch.setattr(f"{watched}_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(f"{watched}_WAITED_SECONDS_MAX", 0.5)
    monkeypatch.setattr(f"{watched}read_run_delays", lambda: {"busy": time.monotonic() * 100})
    reader, writer = os.pipe()
    released = threading.Event()

    class WaitingSandbox(ScriptedSandbox):
        async def detailed_file_usage(self):
            await measure_in_thread((lambda: os.read(reader, 1)) if sleeps else (lambda: released.wait(20)))
            return self.files

    class Releaser(threading.Thread):
        def run(self):
            time.sleep(3)
            released.set()
            os.write(writer, b"x")

    Releaser(daemon=True).start()
    if sleeps:
        assert "could not be counted" in watch_files(WaitingSandbox(KernelUsage()), seconds=2.5)
    else:
        with pytest.raises(TimeoutError):
            watch_files(WaitingSandbox(KernelUsage()), seconds=1.5)


def test_run_delays_grow_while_a_thread_waits_for_a_processor():
    program = """
import os, subprocess, sys, time
from sandbox.runtimes.limits.measurement_scheduling import read_run_delays
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
try:
    ends_at = time.monotonic() + 30
    while max(read_run_delays().values()) < 0.3 and time.monotonic() < ends_at: pass
    print(max(read_run_delays().values()) >= 0.3)
finally:
    for process in busy: process.kill()
"""
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert result.stdout == "True\n"


def test_slow_count_is_repeated_after_a_limited_pause(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling._PAUSE_SECONDS_MAX", 0.1)
    slow = ScriptedSandbox(KernelUsage(), delay_seconds=0.6)
    with pytest.raises(TimeoutError):
        watch_files(slow, seconds=3)
    assert slow.detailed_counts >= 2


def test_pause_after_a_count_that_waited_for_a_processor_is_short():
    waiting = ScriptedSandbox(KernelUsage(), delay_seconds=0.3)
    with pytest.raises(TimeoutError):
        watch_files(waiting, seconds=3)
    assert waiting.detailed_counts >= 3


@pytest.fixture
def counting_uses_cpu(monkeypatch):
    """A count uses CPU time for its whole duration."""
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.read_own_cpu_seconds", time.monotonic)


@pytest.mark.usefixtures("counting_uses_cpu")
@pytest.mark.parametrize(
    ("grown_bytes", "is_early"),
    [(EARLY_COUNT_MEMORY_GROWTH_BYTES + 1, True), (EARLY_COUNT_MEMORY_GROWTH_BYTES, False)],
)
async def test_files_are_counted_early_if_uncharged_kernel_memory_grows(grown_bytes, is_early):
    sandbox = ScriptedSandbox(KernelUsage())
    sandbox.count_seconds, sandbox.uncharged = 0.3, 7 << 30  # a pause of 3 s follows
    watching = asyncio.create_task(watch(sandbox))
    await asyncio.sleep(0.6)
    assert sandbox.counts == 1
    sandbox.open_files, sandbox.uncharged = FileUsage(9000, directories=8193), (7 << 30) + grown_bytes
    done, _ = await asyncio.wait([watching], timeout=1.5)
    assert bool(done) == is_early
    watching.cancel()


@pytest.mark.usefixtures("counting_uses_cpu")
async def test_pause_before_an_early_count_is_at_least_the_duration_of_a_count():
    sandbox = ScriptedSandbox(KernelUsage())
    sandbox.count_seconds, sandbox.uncharged = 0.3, 0

    def grow():
        sandbox.uncharged += EARLY_COUNT_MEMORY_GROWTH_BYTES + 1
        return sandbox.uncharged

    sandbox.kernel_bytes_outside_cgroup = grow
    watching = asyncio.create_task(watch(sandbox))
    await asyncio.sleep(2.9)
    assert 3 <= sandbox.counts <= 5
    watching.cancel()


def test_kernel_usage_within_the_limits_or_without_limits_is_not_a_violation(monkeypatch):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.KERNEL_USAGE_CHECK_INTERVAL_SECONDS", 0.001)

    async def run(usage):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await watch(ScriptedSandbox(usage))

    for usage in (KernelUsage(), KernelUsage(8192, 64 << 20, 64 << 20), KernelUsage(None, 1 << 40, None)):
        asyncio.run(run(usage))
