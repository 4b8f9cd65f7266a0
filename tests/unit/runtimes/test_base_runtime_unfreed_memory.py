"""Memory that the kernel keeps in sockets in transit is reported; memory that remains for other reasons is not."""

import logging
import os
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import SandboxHandle
from sandbox.runtimes import base_runtime
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.limits.cgroups import ControlGroup

UID = 1_900_064_999
HANDLE = SandboxHandle("bubblewrap", "abc", {"kernel_uid": str(UID)})
MEBIBYTE = 1024 * 1024


class FakeUids:
    """Returns these results in order when files in transit are checked."""

    def __init__(self, *results: bool) -> None:
        self.results = list(results)

    def __contains__(self, uid: int) -> bool:
        return uid == UID

    def has_files_in_transit(self, uid: int, attempt_id: str) -> bool:
        assert (uid, attempt_id) == (UID, "abc")
        return self.results.pop(0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base_runtime, "_UNMOUNT_SECONDS", 0.02)
    monkeypatch.setattr(base_runtime, "_SOCKET_COLLECTION_SECONDS", 0.02)


def make_runtime(uids: FakeUids | None) -> BaseRuntime:
    runtime = BaseRuntime(driver=None)
    runtime._uids = uids
    return runtime


@pytest.mark.parametrize(
    ("shared_bytes", "kernel_bytes", "results", "expected"),
    [
        (2 * MEBIBYTE, 9, [True, True], 2 * MEBIBYTE + 9),
        (0, 17 * MEBIBYTE, [True, True], 17 * MEBIBYTE),
        (MEBIBYTE, 16 * MEBIBYTE, [], 0),  # no check, because a check starts a process
        (2 * MEBIBYTE, 0, [False], 0),  # files on a tmpfs of the host
        (0, 17 * MEBIBYTE, [False], 0),  # many files
        (2 * MEBIBYTE, 0, [True, False], 0),  # the kernel has collected the sockets
    ],
    ids=["file in memory", "socket buffers", "little memory", "host tmpfs", "many files", "collected"],
)
async def test_unfreed_memory_is_measured(
    tmp_path: Path, shared_bytes: int, kernel_bytes: int, results: list[bool], expected: int
):
    (tmp_path / "memory.stat").write_text(f"kernel {kernel_bytes}\nshmem {shared_bytes}\n")
    uids = FakeUids(*results)
    assert await make_runtime(uids)._measure_unfreed_memory(HANDLE, ControlGroup([tmp_path])) == expected
    assert uids.results == []


async def test_memory_that_is_freed_soon_is_not_reported(tmp_path: Path):
    statistics = tmp_path / "memory.stat"
    statistics.write_text(f"total_shmem {2 * MEBIBYTE}\n")

    class FreeingUids(FakeUids):
        def has_files_in_transit(self, uid: int, attempt_id: str) -> bool:
            statistics.write_text("total_shmem 0\n")
            return super().has_files_in_transit(uid, attempt_id)

    assert await make_runtime(FreeingUids(True))._measure_unfreed_memory(HANDLE, ControlGroup([tmp_path])) == 0


async def test_caches_of_the_kernel_are_dropped_before_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program with many files was killed on a kernel that keeps a few of its sockets."""
    (tmp_path / "memory.stat").write_text(f"kernel {17 * MEBIBYTE}\n")

    def drop(_group: ControlGroup) -> None:
        (tmp_path / "memory.stat").write_text("kernel 4096\n")

    monkeypatch.setattr(base_runtime.cgroups, "reclaim_memory", drop)
    group = ControlGroup([tmp_path])
    assert await make_runtime(FakeUids(True, True))._measure_unfreed_memory(HANDLE, group) == 0


async def test_server_of_an_ordinary_user_measures_nothing(tmp_path: Path):
    """All sandboxes share this user's count of files in transit."""
    (tmp_path / "memory.stat").write_text(f"total_shmem {2 * MEBIBYTE}\n")
    assert await make_runtime(None)._measure_unfreed_memory(HANDLE, ControlGroup([tmp_path])) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can claim kernel uids")
async def test_destroy_logs_the_number_of_bytes_and_adds_it_up(monkeypatch: pytest.MonkeyPatch, caplog):
    runtime = BaseRuntime(driver=None)

    async def measure(_handle: SandboxHandle, _group: ControlGroup) -> int:
        return 2 * MEBIBYTE

    monkeypatch.setattr(runtime, "_measure_unfreed_memory", measure)
    assert runtime.unfreed_bytes("abc") == 0
    with caplog.at_level(logging.ERROR):
        await runtime.destroy(HANDLE, None)
        await runtime.destroy(HANDLE, None)
    assert runtime.unfreed_bytes("abc") == 4 * MEBIBYTE
    assert "2097152 bytes" in caplog.text
    assert "becomes free when the host restarts" in caplog.text
