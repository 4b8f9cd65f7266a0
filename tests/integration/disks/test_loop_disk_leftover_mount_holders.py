"""A process that outlived its runner and holds the disk's mount is killed, and the disk is released.

No other process is killed.
"""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from doubles.deployment import wait_until
from doubles.multiprocessing_forkserver import MULTIPROCESSING_FORKSERVER
from sandbox.disks.loop_disk import (
    LoopDisk,
    MountHolderLeftovers,
    find_devices,
    loop_unavailable_reason,
    unshare_mounts,
)
from sandbox.interfaces.task_file_layout import TaskLayout

ATTEMPT_ID = "abcdefghijkl"
MIB = 1024 * 1024


@pytest.fixture
def layout(tmp_path):
    reason = asyncio.run(loop_unavailable_reason(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")
    layout = TaskLayout(tmp_path, "task-1").attempt(ATTEMPT_ID)
    layout.root.mkdir(parents=True)
    return layout


def run_runner(layout, queue):
    """Simulate a runner that is killed and leaves a process in its mount namespace."""
    unshare_mounts()
    asyncio.run(LoopDisk(layout).open(16 * MIB))
    queue.put(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    queue.close()
    queue.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


def start_leftover(layout):
    queue = MULTIPROCESSING_FORKSERVER.Queue()
    runner = MULTIPROCESSING_FORKSERVER.Process(target=run_runner, args=(layout, queue))
    runner.start()
    pid = queue.get(timeout=60)
    runner.join(60)
    return pid


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


async def test_process_that_holds_the_disk_is_killed_and_the_disk_released(layout, tmp_path):
    pid = start_leftover(layout)
    with subprocess.Popen(["sleep", "600"], cwd=layout.root) as unrelated_process:
        try:
            assert MountHolderLeftovers(tmp_path).attempt_ids() == {ATTEMPT_ID}
            await MountHolderLeftovers(tmp_path).clean_up(ATTEMPT_ID, layout)
            wait_until(lambda: not is_alive(pid), description="the end of the holder")
            assert not find_devices(layout.disk_image)
            assert not MountHolderLeftovers(tmp_path).attempt_ids()
            assert unrelated_process.poll() is None
        finally:
            unrelated_process.kill()


def test_disk_of_another_data_directory_is_not_listed(layout, tmp_path):
    pid = start_leftover(layout)
    other = tmp_path / "other"
    other.mkdir()
    try:
        assert not MountHolderLeftovers(other).attempt_ids()
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def mount_and_clean_up(layout, data_dir, queue):
    """Simulate an operator who mounts the disk in this process's namespace."""
    unshare_mounts()
    asyncio.run(LoopDisk(layout).open(16 * MIB))
    with subprocess.Popen(["sleep", "600"]) as unrelated_process:
        asyncio.run(MountHolderLeftovers(data_dir).clean_up(ATTEMPT_ID, layout))
        queue.put(unrelated_process.poll())
        unrelated_process.kill()


def test_cleanup_kills_no_process_if_the_disk_is_mounted_in_the_namespace_of_the_server(layout, tmp_path):
    queue = MULTIPROCESSING_FORKSERVER.Queue()
    child = MULTIPROCESSING_FORKSERVER.Process(target=mount_and_clean_up, args=(layout, tmp_path, queue))
    child.start()
    assert queue.get(timeout=60) is None
    child.join(60)
    assert child.exitcode == 0


def test_devices_are_found_by_any_path_to_the_image(layout, tmp_path):
    pid = start_leftover(layout)
    try:
        (tmp_path / "link").symlink_to(layout.root)
        hard = tmp_path / "hard-link.img"
        hard.hardlink_to(layout.disk_image)
        devices = find_devices(layout.disk_image)
        assert len(devices) == 1
        assert find_devices(tmp_path / "link" / "disk.img") == find_devices(hard) == devices
    finally:
        os.kill(pid, signal.SIGKILL)
