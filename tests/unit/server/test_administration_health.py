"""The readiness report of the server."""

import asyncio
import errno
import re
from types import SimpleNamespace

import pytest
from msgspec import structs

from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.disks.reserve_file import ReserveFile
from sandbox.interfaces.placement import ProbeResult
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.store import StoreError
from sandbox.model.resources import DiskSpace, Watermark
from sandbox.server.administration import HealthCheck
from sandbox.server.placements import ProbedHost
from sandbox.server.start_conditions import DiskMonitor, Drain, StartConditions

GIB = 1024**3
AMPLE_SPACE = DiskSpace(100 * GIB, 1000 * GIB, 10**6, 10**7)


class SimulatedHealthCheck:
    """A health check on a simulated disk."""

    def __init__(self, data_dir):
        self.space = AMPLE_SPACE
        self.reserve = ReserveFile(data_dir / "reserve", 4096)
        self.disk_monitor = DiskMonitor(data_dir, self.measure, Watermark(5, 4 * GIB), self.reserve)
        self.drain = Drain(data_dir)
        self.host_problem = None
        machine = SimpleNamespace(blocked_reason=lambda: self.host_problem)
        probes = [RuntimeProbe("bubblewrap", True, "namespaces", 1)]
        host = ProbedHost(ProbeResult(probes, "bubblewrap", "namespaces"), machine, SystemClock())
        self.missing_keys = set()
        api_key_variables = {"claude": "CLAUDE_KEY", "other": "OTHER_KEY"}
        conditions = StartConditions(self.drain, host, self.disk_monitor, api_key_variables, self.missing_keys)
        self.health_check = HealthCheck(MemoryStore(), SystemClock(), conditions, self.disk_monitor, self.drain, host)

    def measure(self):
        if isinstance(self.space, OSError):
            raise self.space
        return self.space

    def reasons(self, space=None):
        self.space = space or self.space
        report = self.health_check.run()
        assert report.is_ready == (not report.reasons)
        return " ".join(report.reasons)


@pytest.fixture
def health(tmp_path):
    result = SimulatedHealthCheck(tmp_path)
    result.disk_monitor.check()
    return result


def test_healthy_server_is_ready(health):
    assert health.reasons() == ""
    assert health.reserve.is_allocated


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        (structs.replace(AMPLE_SPACE, is_read_only=True), "is read-only"),
        (structs.replace(AMPLE_SPACE, free_bytes=4 * GIB - 1), "4095 MiB are free, but new tasks need 5120 MiB"),
        (structs.replace(AMPLE_SPACE, files_free=10), "almost no free inodes"),
        (OSError(5, "Input/output error"), "cannot be checked: Input/output error"),
    ],
)
def test_unusable_disk_is_reported(health, space, reason):
    assert reason in health.reasons(space)


async def test_unreadable_reserve_is_reported_and_checked_again(health, monkeypatch):
    space_freed = asyncio.Event()
    monkeypatch.setattr("sandbox.server.start_conditions.DISK_SPACE_CHECK_INTERVAL_SECONDS", 0.005)

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    async def run():
        monitoring = asyncio.create_task(health.disk_monitor.run(space_freed.set))
        async with asyncio.timeout(10):
            while health.disk_monitor.shortage is None:
                await asyncio.sleep(0)
            assert "cannot be checked: Permission denied" in health.disk_monitor.shortage
            broken.undo()
            await space_freed.wait()
        monitoring.cancel()

    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.exists", refuse)
        await run()
    assert health.reasons() == ""


def test_threshold_of_a_small_disk_is_a_percentage(health):
    assert health.reasons(DiskSpace(free_bytes=2 * GIB, total_bytes=20 * GIB)) == ""
    assert "nearly full" in health.reasons(DiskSpace(free_bytes=GIB - 1, total_bytes=20 * GIB))


def test_readiness_has_hysteresis(health):
    assert health.reasons(structs.replace(AMPLE_SPACE, free_bytes=4 * GIB)) == ""
    assert health.reasons(structs.replace(AMPLE_SPACE, free_bytes=3 * GIB)) != ""
    assert health.reasons(structs.replace(AMPLE_SPACE, free_bytes=5 * GIB - 1)) != ""
    assert health.reasons(structs.replace(AMPLE_SPACE, free_bytes=5 * GIB)) == ""


def test_released_reserve_is_not_counted_as_free_space_for_new_tasks(health):
    tiny = DiskSpace(free_bytes=0, total_bytes=100 * 1024**2)
    assert "0 MiB are free" in health.reasons(tiny)
    assert "0 MiB are free" in health.reasons(structs.replace(tiny, free_bytes=16 * 1024**2))
    assert health.reasons(structs.replace(tiny, free_bytes=32 * 1024**2)) == ""


def test_reserve_is_released_on_full_disk_and_reallocated(health):
    health.reasons()
    health.reasons(structs.replace(AMPLE_SPACE, free_bytes=GIB))
    assert health.reserve.is_allocated
    health.reasons(structs.replace(AMPLE_SPACE, free_bytes=1024))
    assert not health.reserve.is_allocated
    health.reasons(AMPLE_SPACE)
    assert health.reserve.is_allocated


def test_reserve_is_released_when_no_inodes_are_left(health):
    health.reasons()
    health.reasons(structs.replace(AMPLE_SPACE, files_free=1))
    assert health.reserve.is_allocated
    health.reasons(structs.replace(AMPLE_SPACE, files_free=0))
    assert not health.reserve.is_allocated
    health.reasons(structs.replace(AMPLE_SPACE, files_free=1))
    assert not health.reserve.is_allocated
    health.reasons(AMPLE_SPACE)
    assert health.reserve.is_allocated


def test_file_system_without_an_inode_count_is_not_short_of_inodes(health):
    health.reasons(DiskSpace(free_bytes=GIB, total_bytes=100 * GIB))
    assert health.reserve.is_allocated


def test_drained_server_suggests_the_undo_command(health):
    health.drain.start(SystemClock().now())
    assert "sandbox admin drain --undo" in health.reasons()
    health.drain.undo()
    assert health.reasons() == ""


def test_server_is_ready_if_one_agent_has_a_model_key(health):
    health.missing_keys.add("claude")
    assert health.reasons() == ""
    health.missing_keys.add("other")
    assert health.reasons() == "No model key is set: set CLAUDE_KEY or OTHER_KEY and restart the server."


def test_host_that_cannot_start_runners_is_reported(health):
    health.host_problem = "The machine is not responding."
    assert health.reasons() == "The machine is not responding."
    health.host_problem = None
    assert health.reasons() == ""


def test_reasons_have_a_fixed_order(health):
    health.host_problem = "The machine is not responding."
    health.drain.start(SystemClock().now())
    health.missing_keys.update({"claude", "other"})
    reasons = health.reasons(structs.replace(AMPLE_SPACE, free_bytes=0))
    assert re.findall("drained|is not responding|model key|nearly full", reasons) == [
        "drained",
        "is not responding",
        "model key",
        "nearly full",
    ]


def test_drain_persists_even_with_a_damaged_file(health, tmp_path):
    since = SystemClock().now()
    health.drain.start(since)
    health.drain.start(SystemClock().now())
    assert Drain(tmp_path).since == since
    (tmp_path / "draining").write_text("no time")
    assert Drain(tmp_path).since is not None
    health.drain.undo()
    health.drain.undo()
    assert Drain(tmp_path).since is None


def test_server_with_unreadable_index_is_not_ready(health, monkeypatch):

    def broken(_):
        raise StoreError("gone")

    monkeypatch.setattr(MemoryStore, "count_by_state", broken)
    report = health.health_check.run()
    assert (report.is_ready, report.is_store_ok, len(report.reasons)) == (False, False, 1)
