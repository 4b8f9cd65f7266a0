"""Which disks a runner gets: new attempts what the machine can make, old ones what they began with."""

from pathlib import Path

import msgspec
import pytest

from sandbox.bootstrap.runner import choose_disks
from sandbox.disks.directory import DirectoryDisks
from sandbox.disks.loop import LoopDisks
from sandbox.interfaces.layout import TaskLayout
from sandbox.interfaces.placement import LaunchOrder

KINDS = {"loop": LoopDisks, "plain": DirectoryDisks}


@pytest.fixture
def order(tmp_path):
    return LaunchOrder("task-1", "abcdefghijkl", str(tmp_path), "/run", "scripted")


def files(order):
    return TaskLayout(Path(order.data_dir), order.task_id).attempt(order.attempt_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_attempt_gets_what_the_machine_can_make(order, kind):
    assert isinstance(choose_disks(msgspec.structs.replace(order, disks=kind)), KINDS[kind])


@pytest.mark.parametrize("purpose", ["finish", "visit"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("began_with", KINDS)
def test_an_old_attempt_keeps_what_it_began_with(order, kind, began_with, purpose):
    """A server may have found no loop device when it started again, or root's rights."""
    disk = files(order).disk
    (disk / "workspace").mkdir(parents=True)
    if began_with == "loop":
        files(order).disk_image.touch()
    later = msgspec.structs.replace(order, disks=kind, **{purpose: True})
    assert isinstance(choose_disks(later), KINDS[began_with])
