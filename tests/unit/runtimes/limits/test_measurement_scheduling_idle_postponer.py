"""The kernel usage of a sandbox is measured less often while no program in it runs, and soon after one has run."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import KERNEL_USAGE_CHECK_INTERVAL_SECONDS, SOCKETS_MAX
from sandbox.runtimes.limits import measurement_scheduling
from sandbox.runtimes.limits.measurement_scheduling import MeasurementPostponer, wait_for_exceeded_limit
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_scheduling, "_CPU_TIME_POLL_SECONDS", 0.001)
    for name in ("KERNEL_USAGE", "FILE_USAGE", "TERMINAL_AND_LOCK"):
        monkeypatch.setattr(f"sandbox.runtimes.limits.measurement_scheduling.{name}_CHECK_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.read_own_cpu_seconds", lambda: 0.0)


@pytest.fixture
def endless_postponement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_scheduling, "_POSTPONED_SECONDS_MAX", 60.0)


class FakeSandbox:
    """A sandbox whose CPU time the test sets.

    changes_while_idle: whether its usage changes although none of its programs runs.
    """

    def __init__(self, cpu_seconds: float | None = 7.0, nohz_full_file: Path = Path("/nonexistent")) -> None:
        self.cpu_seconds, self.changes_while_idle = cpu_seconds, False
        self.postponer = MeasurementPostponer(lambda: self.cpu_seconds, lambda: self.changes_while_idle, nohz_full_file)

    async def is_measurement_due_after(self, *, cpu_seconds: float = 0.0, changes_while_idle: bool = False) -> bool:
        """Return whether a measurement is due after the sandbox has used CPU time while the runner waits."""
        self.postponer.record_cpu_time()
        waiting = asyncio.create_task(self.postponer.wait_until_due())
        try:
            await asyncio.sleep(0.02)
            assert not waiting.done()
            if self.cpu_seconds is not None:
                self.cpu_seconds += cpu_seconds
            self.changes_while_idle = changes_while_idle
            done, _ = await asyncio.wait([waiting], timeout=5.0 if cpu_seconds or changes_while_idle else 0.1)
            return bool(done)
        finally:
            waiting.cancel()


@pytest.mark.usefixtures("endless_postponement")
@pytest.mark.parametrize(
    ("cpu_seconds", "changes_while_idle", "is_due"), [(0.0, False, False), (1e-9, False, True), (0.0, True, True)]
)
async def test_measurement_is_due_when_a_program_has_run_or_usage_changes_without_one(
    cpu_seconds: float, changes_while_idle: bool, is_due: bool
):
    assert (
        await FakeSandbox().is_measurement_due_after(cpu_seconds=cpu_seconds, changes_while_idle=changes_while_idle)
        is is_due
    )


async def test_measurement_of_an_idle_sandbox_is_postponed_for_a_second():
    sandbox, loop = FakeSandbox(), asyncio.get_running_loop()
    sandbox.postponer.record_cpu_time()
    started_at = loop.time()
    async with asyncio.timeout(10):
        await sandbox.postponer.wait_until_due()
    assert loop.time() - started_at > 0.99


async def is_due_at_once(sandbox: FakeSandbox) -> bool:
    waiting = asyncio.create_task(sandbox.postponer.wait_until_due())
    await asyncio.sleep(0)
    try:
        return waiting.done()
    finally:
        waiting.cancel()


@pytest.mark.parametrize(
    ("cpu_seconds", "changes_while_idle", "is_due"),
    [(7.5, False, True), (7.0, True, True), (None, False, True), (7.0, False, False)],
)
async def test_measurement_is_due_at_once_after_a_change_during_the_last_one(
    cpu_seconds: float | None, changes_while_idle: bool, is_due: bool
):
    sandbox = FakeSandbox()
    sandbox.postponer.record_cpu_time()
    sandbox.cpu_seconds, sandbox.changes_while_idle = cpu_seconds, changes_while_idle
    assert await is_due_at_once(sandbox) is is_due


async def test_measurement_is_due_at_once_if_the_cpu_time_is_unknown():
    sandbox = FakeSandbox(cpu_seconds=None)
    sandbox.postponer.record_cpu_time()
    assert await is_due_at_once(sandbox)


@pytest.mark.parametrize(
    ("text", "is_due"), [("\n", False), (" (null)\n", False), ("1-3\n", True), ("2\n", True), (None, False)]
)
async def test_measurement_is_due_at_once_if_a_processor_may_have_no_ticks(
    tmp_path: Path, text: str | None, is_due: bool
):
    """The CPU time of a program that runs on such a processor is not current."""
    path = tmp_path / "nohz_full"
    if text is not None:
        path.write_text(text)
    sandbox = FakeSandbox(nohz_full_file=path)
    sandbox.postponer.record_cpu_time()
    assert await is_due_at_once(sandbox) is is_due


def test_program_that_has_just_started_is_found_before_the_next_measurement_would_have_been(
    monkeypatch: pytest.MonkeyPatch,
):
    """The CPU time of a running program is updated at each tick, at least a hundred times a second."""
    monkeypatch.undo()
    assert measurement_scheduling._CPU_TIME_POLL_SECONDS + 0.01 <= KERNEL_USAGE_CHECK_INTERVAL_SECONDS


async def count_measurements(
    kernel_usage: KernelUsage, cpu_seconds: Callable[[], float | None], *, changes_while_idle: bool = False
) -> dict[str, int]:
    """Return how often each kind of usage is measured in 0.3 s."""
    counts = dict.fromkeys(("kernel", "files", "details", "terminals", "locks"), 0)

    def make_measurement(name: str, usage: KernelUsage | FileUsage):
        async def measure():
            counts[name] += 1
            return usage

        return measure

    watching = asyncio.create_task(
        wait_for_exceeded_limit(
            make_measurement("kernel", kernel_usage),
            make_measurement("files", FileUsage()),
            make_measurement("details", FileUsage()),
            lambda: None,
            make_measurement("terminals", kernel_usage),
            make_measurement("locks", kernel_usage),
            MeasurementPostponer(cpu_seconds, lambda: changes_while_idle, Path("/nonexistent")),
        )
    )
    await asyncio.sleep(0.3)
    assert not watching.done()
    watching.cancel()
    return counts


BOUNDED_WHILE_IDLE = KernelUsage(is_bounded_while_idle=True)


@pytest.mark.usefixtures("endless_postponement")
async def test_only_the_measurement_of_kernel_usage_is_postponed_for_an_idle_sandbox():
    """Kernel threads process terminal input, and a program can get a lock without running."""
    counts = await count_measurements(BOUNDED_WHILE_IDLE, lambda: 7.0)
    assert counts.pop("kernel") == 1
    assert min(counts.values()) > 5


@pytest.mark.usefixtures("endless_postponement")
@pytest.mark.parametrize(
    ("kernel_usage", "cpu_seconds", "changes_while_idle"),
    [
        (BOUNDED_WHILE_IDLE, itertools.count(7).__next__, False),
        (BOUNDED_WHILE_IDLE, lambda: None, False),
        (BOUNDED_WHILE_IDLE, lambda: 7.0, True),
        (KernelUsage(is_bounded_while_idle=False), lambda: 7.0, False),
        (KernelUsage(), lambda: 7.0, False),
    ],
    ids=["busy", "unknown CPU time", "changes while idle", "not bounded", "not bounded unless stated"],
)
async def test_measurement_of_kernel_usage_that_may_change_is_not_postponed(
    kernel_usage: KernelUsage, cpu_seconds: Callable[[], float | None], changes_while_idle: bool
):
    assert (await count_measurements(kernel_usage, cpu_seconds, changes_while_idle=changes_while_idle))["kernel"] > 5


@pytest.mark.usefixtures("endless_postponement")
async def test_limit_that_is_exceeded_during_a_short_run_is_found():
    sandbox, measured = FakeSandbox(), asyncio.Event()

    async def kernel_usage() -> KernelUsage:
        measured.set()
        return KernelUsage(sockets=1 if sandbox.cpu_seconds == 7.0 else SOCKETS_MAX + 1, is_bounded_while_idle=True)

    async def files() -> FileUsage:
        return FileUsage()

    watching = asyncio.create_task(
        wait_for_exceeded_limit(kernel_usage, files, files, lambda: None, None, None, sandbox.postponer)
    )
    async with asyncio.timeout(10):
        await measured.wait()
        await asyncio.sleep(0.05)
        assert not watching.done()
        sandbox.cpu_seconds = 7.001
        assert f"{SOCKETS_MAX + 1} sockets" in await watching
