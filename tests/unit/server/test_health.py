"""Why a server is not ready, as it says itself."""

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
ROOMY = DiskSpace(100 * GIB, 1000 * GIB, 10**6, 10**7)


class Machine:
    """A server's health on a disk that the test makes up."""

    def __init__(self, data_dir):
        self.space = ROOMY
        self.reserve = ReserveFile(data_dir / "reserve", 4096)
        self.keeper = DiskMonitor(data_dir, self.measure, Watermark(5, 4 * GIB), self.reserve)
        self.drain = Drain(data_dir)
        probes = [RuntimeProbe("bubblewrap", True, "namespaces", 1)]
        prober = RuntimeProber(
            ProbeResult(probes, LaunchOrder("", "", "", "", "bubblewrap"), "namespaces"), None, SystemClock()
        )
        self.report = HealthCheck(MemoryStore(), SystemClock(), self.keeper, self.drain, prober, ())

    def measure(self):
        if isinstance(self.space, OSError):
            raise self.space
        return self.space

    def reasons(self, space=None):
        self.space = space or self.space
        health = self.report.run()
        assert health.is_ready == (not health.reasons)
        return " ".join(health.reasons)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    made.keeper.check()
    return made


def test_a_server_with_everything_is_ready(machine):
    assert machine.reasons() == ""
    assert machine.reserve.is_allocated


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        (structs.replace(ROOMY, is_read_only=True), "is read-only"),
        (structs.replace(ROOMY, free_bytes=4 * GIB - 1), "4095 MiB are free, new tasks need 5120 MiB"),
        (structs.replace(ROOMY, files_free=10), "almost no free inodes"),
        (OSError(5, "Input/output error"), "cannot be checked: Input/output error"),
    ],
)
def test_a_disk_that_takes_nothing_is_told(machine, space, reason):
    assert reason in machine.reasons(space)


def test_a_reserve_that_cannot_be_looked_at_is_told_and_looked_at_again(machine, monkeypatch):
    more = asyncio.Event()
    machine.keeper.on_space_freed = more.set
    monkeypatch.setattr("sandbox.server.maintenance.disk_monitor.DISK_SPACE_CHECK_SECONDS", 0.005)

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    async def play():
        keeping = asyncio.create_task(machine.keeper.run())
        async with asyncio.timeout(10):
            while machine.keeper.shortage is None:
                await asyncio.sleep(0)
            assert "cannot be checked: Permission denied" in machine.keeper.shortage
            broken.undo()
            await more.wait()
        keeping.cancel()

    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.exists", refuse)
        asyncio.run(play())
    assert machine.reasons() == ""


def test_a_small_disk_is_measured_by_its_share_and_a_file_system_that_counts_no_files_by_its_bytes(machine):
    assert machine.reasons(DiskSpace(free_bytes=2 * GIB, total_bytes=20 * GIB)) == ""
    assert "nearly full" in machine.reasons(DiskSpace(free_bytes=GIB - 1, total_bytes=20 * GIB))


def test_the_server_is_ready_again_only_when_there_is_clearly_more_room(machine):
    assert machine.reasons(structs.replace(ROOMY, free_bytes=4 * GIB)) == ""
    assert machine.reasons(structs.replace(ROOMY, free_bytes=3 * GIB)) != ""
    assert machine.reasons(structs.replace(ROOMY, free_bytes=5 * GIB - 1)) != ""
    assert machine.reasons(structs.replace(ROOMY, free_bytes=5 * GIB)) == ""


def test_the_reserve_that_was_given_back_is_no_room_for_new_tasks(machine):
    tiny = DiskSpace(free_bytes=0, total_bytes=100 * 1024**2)
    assert "0 MiB are free" in machine.reasons(tiny)
    assert "0 MiB are free" in machine.reasons(structs.replace(tiny, free_bytes=16 * 1024**2))
    assert machine.reasons(structs.replace(tiny, free_bytes=32 * 1024**2)) == ""


def test_the_reserve_is_given_back_when_nothing_else_is_left_and_taken_again(machine):
    machine.reasons()
    machine.reasons(structs.replace(ROOMY, free_bytes=GIB))
    assert machine.reserve.is_allocated
    machine.reasons(structs.replace(ROOMY, free_bytes=1024))
    assert not machine.reserve.is_allocated
    machine.reasons(ROOMY)
    assert machine.reserve.is_allocated


def test_the_reserve_is_a_file_too_where_no_other_can_be_made(machine):
    machine.reasons()
    machine.reasons(structs.replace(ROOMY, files_free=1))
    assert machine.reserve.is_allocated
    machine.reasons(structs.replace(ROOMY, files_free=0))
    assert not machine.reserve.is_allocated
    machine.reasons(structs.replace(ROOMY, files_free=1))
    assert not machine.reserve.is_allocated
    machine.reasons(ROOMY)
    assert machine.reserve.is_allocated


def test_a_file_system_that_counts_no_files_has_some(machine):
    machine.reasons(DiskSpace(free_bytes=GIB, total_bytes=100 * GIB))
    assert machine.reserve.is_allocated


def test_a_server_that_is_drained_says_how_to_undo_it(machine):
    machine.drain.start(SystemClock().now())
    assert "sandbox admin drain --undo" in machine.reasons()
    machine.drain.undo()
    assert machine.reasons() == ""


def test_a_drain_outlives_the_server_and_so_does_one_whose_file_is_damaged(machine, tmp_path):
    since = SystemClock().now()
    machine.drain.start(since)
    machine.drain.start(SystemClock().now())
    assert Drain(tmp_path).since == since
    (tmp_path / "draining").write_text("no time")
    assert Drain(tmp_path).since is not None
    machine.drain.undo()
    machine.drain.undo()
    assert Drain(tmp_path).since is None


def test_a_server_that_cannot_read_its_index_is_not_ready(machine, monkeypatch):

    def broken(_):
        raise StoreError("gone")

    monkeypatch.setattr(MemoryStore, "count_by_state", broken)
    health = machine.report.run()
    assert (health.is_ready, health.is_store_ok, len(health.reasons)) == (False, False, 1)
