"""On a full host file system, releasing the reserve frees usable space, and data loss is reported."""

import asyncio
import os
from contextlib import nullcontext, suppress

import pytest

from doubles.multiprocessing_forkserver import MULTIPROCESSING_FORKSERVER
from doubles.syscall_faults import fill_file_system, small_file_system
from sandbox.disks.loop_disk import LoopDisk, loop_unavailable_reason, unshare_mounts
from sandbox.disks.reserve_file import ReserveFile, measure_disk_space
from sandbox.interfaces.task_file_layout import AttemptLayout

MIB = 1024**2


@pytest.fixture
def small_file_system_root(tmp_path):
    reason = asyncio.run(loop_unavailable_reason(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")
    with small_file_system(tmp_path / "host", 64 * MIB) as directory:
        yield directory


def test_released_reserve_is_writable_on_a_full_disk(small_file_system_root):
    reserve = ReserveFile(small_file_system_root / "reserve", 4 * MIB)
    reserve.allocate()
    reserve.allocate()
    fill_file_system(small_file_system_root)
    with pytest.raises(OSError, match="No space left"):
        (small_file_system_root / "end").write_bytes(b"x" * MIB)
    assert reserve.release()
    (small_file_system_root / "end").write_bytes(b"x" * 3 * MIB)
    assert not reserve.release()
    with pytest.raises(OSError, match="No space left"):
        reserve.allocate()
    assert not reserve.is_allocated
    assert not (small_file_system_root / "reserve.part").exists()
    assert measure_disk_space(small_file_system_root).free_bytes < 2 * MIB


@pytest.mark.parametrize(("written_bytes", "is_lost"), [(8 * MIB, False), (200 * MIB, True)])
def test_disk_reports_data_loss_on_a_full_host(small_file_system_root, written_bytes, is_lost):
    """The attempt's disk (1 GiB) is larger than the host's file system, so writers see no error until data is lost."""
    child = MULTIPROCESSING_FORKSERVER.Process(target=_write, args=(small_file_system_root, written_bytes, is_lost))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _write(small_file_system_root, written_bytes, is_lost):
    unshare_mounts()
    asyncio.run(_write_and_verify(small_file_system_root, written_bytes, is_lost))


async def _write_and_verify(small_file_system_root, written_bytes, is_lost):
    layout = AttemptLayout(small_file_system_root / "attempt")
    disk = LoopDisk(layout)
    layout.root.mkdir()
    await disk.open(1024 * MIB)
    with suppress(OSError) if is_lost else nullcontext(), (layout.disk / "large").open("wb") as file:
        for _ in range(written_bytes // MIB):
            file.write(os.urandom(MIB))
    for _ in range(2):
        await verify(disk, is_lost)
    await disk.close()
    await verify(disk, is_lost)


async def verify(disk, is_lost):
    if not is_lost:
        await disk.sync()
        return
    with pytest.raises(OSError, match=r"Input/output error|No space left|Read-only"):
        await disk.sync()
