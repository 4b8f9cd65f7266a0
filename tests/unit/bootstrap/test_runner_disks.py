"""The disks of a runner: a new attempt uses the disk kind of its host, and an old attempt keeps its disk kind."""

import pytest

from sandbox.bootstrap.runner import choose_disk
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.disks.loop_disk import LoopDisk
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunDebugSession
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.placements.local.runner_starters import RunnerSettings

DISKS = {"loop": LoopDisk, "plain": DirectoryDisk}
IDS = ("task-1", "abcdefghijkl")
LATER_ORDERS = [FinishAttempt(*IDS), RunDebugSession(*IDS), RunAttempt(*IDS, resumes=True)]


def host_with(tmp_path, kind):
    return RunnerSettings(str(tmp_path), "/run", "scripted", disk_kind=kind)


@pytest.mark.parametrize("kind", DISKS)
def test_new_attempt_uses_the_disk_kind_of_the_host(tmp_path, kind):
    assert isinstance(choose_disk(RunAttempt(*IDS), host_with(tmp_path, kind)), DISKS[kind])


@pytest.mark.parametrize("order", LATER_ORDERS, ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("original_kind", DISKS)
def test_old_attempt_keeps_its_disk_kind(tmp_path, kind, original_kind, order):
    """After a restart, the host may lack loop devices or root privileges, so its settings may name another kind."""
    layout = TaskLayout(tmp_path, "task-1").attempt("abcdefghijkl")
    (layout.disk / "workspace").mkdir(parents=True)
    if original_kind == "loop":
        layout.disk_image.touch()
    assert isinstance(choose_disk(order, host_with(tmp_path, kind)), DISKS[original_kind])
