"""Resource exhaustion is reported once, and explains an agent failure that has no reason."""

import asyncio
from pathlib import Path

import pytest

from sandbox.interfaces.agent import AgentOutcome
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.runtime import FileUsage, KernelUsage, Stats
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Lifecycle, Vm
from sandbox.runner.resource_exhaustion import ExhaustionDetector, TimeLimit

KILLED = Failure(FailureCode.AGENT_FAILED, "Claude Code was killed by signal 9.")
SILENT = AgentOutcome(None, KILLED)
"""The outcome of an agent that died without output."""
NORMAL_STATS = Stats(1.0, 1, 1)


class ScriptedDisks:
    """Disks with a scripted usage."""

    enforces_size = True

    def __init__(self):
        self.is_full, self.is_lost = False, False

    async def usage(self, files):
        if self.is_lost:
            raise OSError("gone")
        return DiskUsage(100 if self.is_full else 50, 100, self.is_full)


class ExhaustionScenario:
    def __init__(self):
        self.disks, self.events = ScriptedDisks(), []
        files = AttemptLayout(Path("/nowhere"))
        self.detector = ExhaustionDetector(Vm(disk="1G", memory="2G"), self.disks, files, self.events.append)

    def check_disk(self):
        asyncio.run(self.detector.check_disk())

    @property
    def codes(self):
        return [event.error for event in self.events]


@pytest.fixture
def scenario():
    return ExhaustionScenario()


def test_sufficient_resources_report_nothing(scenario):
    scenario.detector.update(NORMAL_STATS)
    scenario.check_disk()
    assert scenario.events == []
    assert scenario.detector.disk_usage == DiskUsage(50, 100, False)
    assert scenario.detector.explain_failure(SILENT, "Claude Code") is KILLED
    assert scenario.detector.explain_failure(AgentOutcome(None, None), "Claude Code") is None


def test_full_disk_is_reported_once_and_explains_the_failure(scenario):
    scenario.disks.is_full = True
    scenario.check_disk()
    scenario.check_disk()
    assert scenario.codes == ["disk_full"]
    failure = scenario.detector.explain_failure(SILENT, "Claude Code")
    assert failure.code == "disk_full"
    assert "vm.disk is 1G" in failure.message
    assert KILLED.message in failure.message


@pytest.mark.parametrize("code", [FailureCode.TIMEOUT, FailureCode.OUT_OF_MEMORY, FailureCode.BUDGET_EXCEEDED])
def test_specific_failure_is_not_replaced(scenario, code):
    scenario.disks.is_full = True
    scenario.check_disk()
    assert scenario.detector.explain_failure(AgentOutcome(None, Failure(code, "known")), "Claude Code").code == code
    assert scenario.detector.explain_failure(AgentOutcome(None, None), "Claude Code") is None


def test_fork_failures_are_reported_once(scenario):
    scenario.detector.update(Stats(1.0, 1, 512, fork_failures=9))
    scenario.detector.update(Stats(1.0, 1, 512, fork_failures=10))
    assert scenario.codes == ["process_limit"]
    assert scenario.detector.explain_failure(SILENT, "Claude Code").code == "process_limit"


def explained_code(scenario, message, result):
    return scenario.detector.explain_failure(
        AgentOutcome(result, Failure(FailureCode.AGENT_FAILED, message)), "Claude Code"
    ).code


@pytest.mark.parametrize(
    "message", ["Claude Code did not finish within its turns; raise claude.max_turns.", "API Error: 401"]
)
def test_agent_error_is_not_attributed_to_an_earlier_exhaustion(scenario, message):
    scenario.disks.is_full = True
    scenario.check_disk()
    scenario.detector.update(Stats(1.0, 1, 512, fork_failures=9))
    assert scenario.codes == ["disk_full", "process_limit"]
    assert explained_code(scenario, message, {"is_error": True}) == "agent_failed"
    assert explained_code(scenario, "Claude Code exited with code 1.", {"is_error": False}) == "disk_full"


def test_agent_error_that_names_the_exhaustion_is_attributed_to_it(scenario):
    disk_error, fork_error = "ENOSPC: no space left on device, write", "spawn /bin/bash EAGAIN"
    assert explained_code(scenario, disk_error, {"is_error": True}) == "agent_failed"
    scenario.disks.is_full = True
    scenario.check_disk()
    assert explained_code(scenario, disk_error, {"is_error": True}) == "disk_full"
    assert explained_code(scenario, fork_error, {"is_error": True}) == "agent_failed"
    scenario.detector.update(Stats(1.0, 1, 512, fork_failures=9))
    assert explained_code(scenario, fork_error, {"is_error": True}) == "process_limit"


def test_disk_that_was_full_only_earlier_explains_nothing(scenario):
    scenario.disks.is_full = True
    scenario.check_disk()
    scenario.disks.is_full = False
    scenario.check_disk()
    assert scenario.codes == ["disk_full"]
    assert scenario.detector.explain_failure(SILENT, "Claude Code") is KILLED


def test_oom_kill_is_reported_while_the_agent_runs(scenario):
    scenario.detector.update(Stats(1.0, 1, 1, oom_kills=1))
    assert scenario.codes == ["out_of_memory"]
    assert "vm.memory" in scenario.events[0].message


def test_unreadable_disk_is_reported_and_the_last_usage_is_kept(scenario):
    scenario.check_disk()
    scenario.disks.is_lost = True
    scenario.check_disk()
    assert scenario.codes == ["internal_error"]
    assert scenario.detector.disk_usage.used_bytes == 50


class ScriptedSandbox:
    """A sandbox with scripted kernel usage; the last values repeat."""

    def __init__(self, *usages, files=FileUsage(), open_files=FileUsage(), delay_seconds=0.0):  # noqa: B008
        self.usages = list(usages)
        self.files, self.open_files = files, open_files
        self.delay_seconds = delay_seconds
        self.detailed_counts = 0

    async def kernel_usage(self):
        return self.usages.pop(0) if len(self.usages) > 1 else self.usages[0]

    async def file_counts(self):
        return self.open_files

    async def detailed_file_usage(self):
        self.detailed_counts += 1
        await asyncio.sleep(self.delay_seconds)
        return self.files


def watch_until_exceeded(scenario, monkeypatch, *usages):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch.KERNEL_USAGE_CHECK_SECONDS", 0.001)

    async def run():
        async with asyncio.timeout(10):
            return await scenario.detector.watch_kernel_usage(ScriptedSandbox(*usages))

    return asyncio.run(run())


def test_socket_count_over_the_limit_is_a_failure(scenario, monkeypatch):
    failure = watch_until_exceeded(scenario, monkeypatch, KernelUsage(10), KernelUsage(8192), KernelUsage(8193))
    assert (failure.code, failure.message.partition(";")[0]) == (
        "out_of_memory", "The sandbox had 8193 sockets, and the limit is 8192",
    )  # fmt: skip


def test_socket_buffers_over_the_limit_are_a_failure(scenario, monkeypatch):
    at, over = KernelUsage(10, 64 << 20, 64 << 20), KernelUsage(10, 65 << 20, 64 << 20)
    failure = watch_until_exceeded(scenario, monkeypatch, KernelUsage(10, 1 << 40, None), at, over)
    assert failure.code == "out_of_memory"
    assert "held 65 MiB in their buffers, and the limit for its vm.memory is 64 MiB" in failure.message


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (FileUsage(131_073), "had 131073 open files, and the limit is 131072"),
        (FileUsage(9000, directories=8193), "more than 8192 open directories"),
        (FileUsage(9000, locks=8193), "more than 8192 locks on files"),
    ],
)
async def test_open_files_directories_or_locks_over_the_limit_are_a_failure(scenario, files, reason):
    async def run():
        async with asyncio.timeout(10):
            return await scenario.detector.watch_kernel_usage(ScriptedSandbox(KernelUsage(), files=files))

    failure = await run()
    assert failure.code == "out_of_memory"
    assert reason in failure.message


def watch_files(scenario, sandbox, seconds=10):
    async def run():
        async with asyncio.timeout(seconds):
            return await scenario.detector.watch_kernel_usage(sandbox)

    return asyncio.run(run())


def test_hanging_count_does_not_delay_the_count_of_open_files(scenario):
    hanging = ScriptedSandbox(KernelUsage(), open_files=FileUsage(9000, directories=8193), delay_seconds=60)
    assert "more than 8192 open directories" in watch_files(scenario, hanging).message


def test_hanging_count_is_a_failure(scenario, monkeypatch):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch._WAIT_SECONDS", 0.01)
    failure = watch_files(scenario, ScriptedSandbox(KernelUsage(), delay_seconds=60))
    assert (failure.code, "could not be counted within 5 s" in failure.message) == ("out_of_memory", True)


def test_slow_count_is_repeated_soon(scenario, monkeypatch):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch._PAUSE_SECONDS_MAX", 0.1)
    slow = ScriptedSandbox(KernelUsage(), delay_seconds=0.6)
    with pytest.raises(TimeoutError):
        watch_files(scenario, slow, seconds=3)
    assert slow.detailed_counts >= 2


def test_file_usage_within_the_limits_is_not_a_violation(scenario):
    for files in (FileUsage(), FileUsage(131_072, directories=8192, locks=8192)):
        assert files.find_violation() == ""


def test_kernel_usage_within_the_limits_or_unlimited_is_not_a_failure(scenario, monkeypatch):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch.KERNEL_USAGE_CHECK_SECONDS", 0.001)

    async def run(usage):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await scenario.detector.watch_kernel_usage(ScriptedSandbox(usage))

    for usage in (KernelUsage(), KernelUsage(8192, 64 << 20, 64 << 20), KernelUsage(None, 1 << 40, None)):
        asyncio.run(run(usage))


class SteppedClock:
    """A monotonic clock that advances with each sleep."""

    def __init__(self, monkeypatch):
        self.seconds, self.on_sleep = 0.0, lambda: None
        monkeypatch.setattr("sandbox.runner.resource_exhaustion.asyncio.sleep", self.sleep)

    def monotonic(self):
        return self.seconds

    async def sleep(self, seconds):
        self.seconds += seconds
        self.on_sleep()


@pytest.fixture
def stepped_clock(monkeypatch):
    return SteppedClock(monkeypatch)


LIFECYCLE = Lifecycle(timeout="60s", hang_timeout="10s")


async def test_silent_agent_hangs_after_the_hang_timeout(stepped_clock):
    failure = await TimeLimit(LIFECYCLE, stepped_clock, lambda: False).watch(60)
    assert (failure.code, stepped_clock.seconds) == (FailureCode.HANG, 10)


@pytest.mark.parametrize("is_busy", [True, False])
async def test_active_or_busy_agent_times_out_at_the_end_of_the_remaining_time(stepped_clock, is_busy):
    limit = TimeLimit(LIFECYCLE, stepped_clock, lambda: is_busy)
    if not is_busy:
        stepped_clock.on_sleep = limit.count_activity
    failure = await limit.watch(45)
    assert (failure.code, stepped_clock.seconds) == (FailureCode.TIMEOUT, 45)


async def test_hang_timeout_starts_again_with_each_output(stepped_clock):
    limit = TimeLimit(LIFECYCLE, stepped_clock, lambda: False)
    stepped_clock.on_sleep = lambda: limit.count_activity() if stepped_clock.seconds == 7 else None
    assert (await limit.watch(60)).code is FailureCode.HANG
    assert stepped_clock.seconds == 17
