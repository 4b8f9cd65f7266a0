"""The disks of a runner: a new attempt uses the disk kind of its order, an old attempt keeps its disk kind."""

from pathlib import Path

import msgspec
import pytest

from sandbox.bootstrap.runner import choose_disks
from sandbox.disks.directory import DirectoryDisks
from sandbox.disks.loop import LoopDisks
from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.placement import LaunchOrder

DISKS = {"loop": LoopDisks, "plain": DirectoryDisks}


@pytest.fixture
def order(tmp_path):
    return LaunchOrder("task-1", "abcdefghijkl", str(tmp_path), "/run", "scripted")


def attempt_files(order):
    return TaskLayout(Path(order.data_dir), order.task_id).attempt(order.attempt_id)


@pytest.mark.parametrize("kind", DISKS)
def test_new_attempt_uses_the_disk_kind_of_the_order(order, kind):
    assert isinstance(choose_disks(msgspec.structs.replace(order, disk_kind=kind)), DISKS[kind])


@pytest.mark.parametrize("purpose", ["finish", "is_debug_session"])
@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("original_kind", DISKS)
def test_old_attempt_keeps_its_disk_kind(order, kind, original_kind, purpose):
    """After a restart, the server may lack loop devices or root rights, so the order may name another kind."""
    disk = attempt_files(order).disk
    (disk / "workspace").mkdir(parents=True)
    if original_kind == "loop":
        attempt_files(order).disk_image.touch()
    later = msgspec.structs.replace(order, disk_kind=kind, **{purpose: True})
    assert isinstance(choose_disks(later), DISKS[original_kind])
