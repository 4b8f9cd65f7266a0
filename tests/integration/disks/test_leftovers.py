"""A disk that something which outlived its runner still has mounted comes free, and nobody else dies of it."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from doubles.child_processes import OWN_PROCESSES
from doubles.live_server import until
from sandbox.disks.leftovers import DiskLeftovers
from sandbox.disks.loop import LoopDisks, find_devices, loop_unavailable_reason, unshare_mounts
from sandbox.interfaces.layout import TaskLayout

ATTEMPT_ID = "abcdefghijkl"
MIB = 1024 * 1024


@pytest.fixture
def files(tmp_path):
    reason = asyncio.run(loop_unavailable_reason(tmp_path))
    if reason is not None:
        pytest.skip(f"no file system can be mounted here: {reason}")
    layout = TaskLayout(tmp_path, "task-1").attempt(ATTEMPT_ID)
    layout.root.mkdir(parents=True)
    return layout


def run_runner(files, told):
    """A runner that dies and leaves a process of its own behind, in its mount namespace."""
    unshare_mounts()
    asyncio.run(LoopDisks().open(files, 16 * MIB))
    told.put(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    told.close()
    told.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


def left_by_a_runner(files):
    told = OWN_PROCESSES.Queue()
    runner = OWN_PROCESSES.Process(target=run_runner, args=(files, told))
    runner.start()
    pid = told.get(timeout=60)
    runner.join(60)
    return pid


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_that_holds_it_goes_and_the_disk_comes_free(files, tmp_path):
    pid = left_by_a_runner(files)
    with subprocess.Popen(["sleep", "600"], cwd=files.root) as bystander:
        try:
            assert DiskLeftovers(tmp_path).attempt_ids() == {ATTEMPT_ID}
            asyncio.run(DiskLeftovers(tmp_path).clean_up(ATTEMPT_ID, files))
            until(lambda: not is_alive(pid), what="the end of who held it")
            assert not find_devices(files.disk_image)
            assert not DiskLeftovers(tmp_path).attempt_ids()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_that_of_another_data_directory_is_not_listed(files, tmp_path):
    pid = left_by_a_runner(files)
    other = tmp_path / "other"
    other.mkdir()
    try:
        assert not DiskLeftovers(other).attempt_ids()
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def look_on(files, data_dir, told):
    """As an operator who has mounted it for everybody, this process included."""
    unshare_mounts()
    asyncio.run(LoopDisks().open(files, 16 * MIB))
    with subprocess.Popen(["sleep", "600"]) as beside:
        asyncio.run(DiskLeftovers(data_dir).clean_up(ATTEMPT_ID, files))
        told.put(beside.poll())
        beside.kill()


def test_what_an_operator_has_mounted_for_everybody_is_let_alone(files, tmp_path):
    told = OWN_PROCESSES.Queue()
    child = OWN_PROCESSES.Process(target=look_on, args=(files, tmp_path, told))
    child.start()
    assert told.get(timeout=60) is None
    child.join(60)
    assert child.exitcode == 0


def test_a_disk_is_found_by_whatever_path_leads_to_it(files, tmp_path):
    pid = left_by_a_runner(files)
    try:
        (tmp_path / "link").symlink_to(files.root)
        hard = tmp_path / "hard-link.img"
        hard.hardlink_to(files.disk_image)
        devices = find_devices(files.disk_image)
        assert len(devices) == 1
        assert find_devices(tmp_path / "link" / "disk.img") == find_devices(hard) == devices
    finally:
        os.kill(pid, signal.SIGKILL)
