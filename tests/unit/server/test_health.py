"""The readiness report of the server."""

import asyncio
import errno

import pytest
from msgspec import structs

from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.disks.space import ReserveFile
from sandbox.interfaces.placement import LaunchOrder
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.store import StoreError
from sandbox.model.disk_space import DiskSpace, Watermark
from sandbox.server.drain import Drain
from sandbox.server.health import HealthCheck
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.runtime_prober import ProbeResult, RuntimeProber

GIB = 1024**3
AMPLE_SPACE = DiskSpace(100 * GIB, 1000 * GIB, 10**6, 10**7)


class SimulatedHealthCheck:
    """A health check on a simulated disk."""

    def __init__(self, data_dir):
        self.space = AMPLE_SPACE
        self.reserve = ReserveFile(data_dir / "reserve", 4096)
        self.disk_monitor = DiskMonitor(data_dir, self.measure, Watermark(5, 4 * GIB), self.reserve)
        self.drain = Drain(data_dir)
        probes = [RuntimeProbe("bubblewrap", True, "namespaces", 1)]
        prober = RuntimeProber(
            ProbeResult(probes, LaunchOrder("", "", "", "", "bubblewrap"), "namespaces"), None, SystemClock()
        )
        self.health_check = HealthCheck(MemoryStore(), SystemClock(), self.disk_monitor, self.drain, prober, ())

    def measure(self):
        if isinstance(self.space, OSError):
            raise self.space
        return self.space

    def reasons(self, space=None):
        self.space = space or self.space
        health = self.health_check.run()
        assert health.is_ready == (not health.reasons)
        return " ".join(health.reasons)


@pytest.fixture
def machine(tmp_path):
    result = SimulatedHealthCheck(tmp_path)
    result.disk_monitor.check()
    return result


def test_healthy_server_is_ready(machine):
    assert machine.reasons() == ""
    assert machine.reserve.is_allocated


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        (structs.replace(AMPLE_SPACE, is_read_only=True), "is read-only"),
        (structs.replace(AMPLE_SPACE, free_bytes=4 * GIB - 1), "4095 MiB are free, new tasks need 5120 MiB"),
        (structs.replace(AMPLE_SPACE, files_free=10), "almost no free inodes"),
        (OSError(5, "Input/output error"), "cannot be checked: Input/output error"),
    ],
)
def test_unusable_disk_is_reported(machine, space, reason):
    assert reason in machine.reasons(space)


def test_unreadable_reserve_is_reported_and_checked_again(machine, monkeypatch):
    space_freed = asyncio.Event()
    machine.disk_monitor.on_space_freed = space_freed.set
    monkeypatch.setattr("sandbox.server.maintenance.disk_monitor.DISK_SPACE_CHECK_SECONDS", 0.005)

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    async def run():
        monitoring = asyncio.create_task(machine.disk_monitor.run())
        async with asyncio.timeout(10):
            while machine.disk_monitor.shortage is None:
                await asyncio.sleep(0)
            assert "cannot be checked: Permission denied" in machine.disk_monitor.shortage
            broken.undo()
            await space_freed.wait()
        monitoring.cancel()

    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.exists", refuse)
        asyncio.run(run())
    assert machine.reasons() == ""


def test_small_disk_is_judged_by_free_percentage(machine):
    assert machine.reasons(DiskSpace(free_bytes=2 * GIB, total_bytes=20 * GIB)) == ""
    assert "nearly full" in machine.reasons(DiskSpace(free_bytes=GIB - 1, total_bytes=20 * GIB))


def test_readiness_has_hysteresis(machine):
    assert machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=4 * GIB)) == ""
    assert machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=3 * GIB)) != ""
    assert machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=5 * GIB - 1)) != ""
    assert machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=5 * GIB)) == ""


def test_released_reserve_is_not_space_for_new_tasks(machine):
    tiny = DiskSpace(free_bytes=0, total_bytes=100 * 1024**2)
    assert "0 MiB are free" in machine.reasons(tiny)
    assert "0 MiB are free" in machine.reasons(structs.replace(tiny, free_bytes=16 * 1024**2))
    assert machine.reasons(structs.replace(tiny, free_bytes=32 * 1024**2)) == ""


def test_reserve_is_released_on_full_disk_and_reallocated(machine):
    machine.reasons()
    machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=GIB))
    assert machine.reserve.is_allocated
    machine.reasons(structs.replace(AMPLE_SPACE, free_bytes=1024))
    assert not machine.reserve.is_allocated
    machine.reasons(AMPLE_SPACE)
    assert machine.reserve.is_allocated


def test_reserve_is_released_when_no_files_are_left(machine):
    machine.reasons()
    machine.reasons(structs.replace(AMPLE_SPACE, files_free=1))
    assert machine.reserve.is_allocated
    machine.reasons(structs.replace(AMPLE_SPACE, files_free=0))
    assert not machine.reserve.is_allocated
    machine.reasons(structs.replace(AMPLE_SPACE, files_free=1))
    assert not machine.reserve.is_allocated
    machine.reasons(AMPLE_SPACE)
    assert machine.reserve.is_allocated


def test_file_system_without_file_count_has_free_files(machine):
    machine.reasons(DiskSpace(free_bytes=GIB, total_bytes=100 * GIB))
    assert machine.reserve.is_allocated


def test_drained_server_reason_names_the_undo_command(machine):
    machine.drain.start(SystemClock().now())
    assert "sandbox admin drain --undo" in machine.reasons()
    machine.drain.undo()
    assert machine.reasons() == ""


def test_drain_persists_even_with_a_damaged_file(machine, tmp_path):
    since = SystemClock().now()
    machine.drain.start(since)
    machine.drain.start(SystemClock().now())
    assert Drain(tmp_path).since == since
    (tmp_path / "draining").write_text("no time")
    assert Drain(tmp_path).since is not None
    machine.drain.undo()
    machine.drain.undo()
    assert Drain(tmp_path).since is None


def test_server_with_unreadable_index_is_not_ready(machine, monkeypatch):

    def broken(_):
        raise StoreError("gone")

    monkeypatch.setattr(MemoryStore, "count_by_state", broken)
    health = machine.health_check.run()
    assert (health.is_ready, health.is_store_ok, len(health.reasons)) == (False, False, 1)
