"""Changing a disk's owner affects every file on the disk and nothing outside it, and uses bounded memory."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes import sandbox_filesystem

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root changes owners")

UID = 1_900_000_777


@pytest.fixture
def disk(tmp_path):
    """An empty disk."""
    directory = tmp_path / "disk"
    directory.mkdir()
    sandbox_filesystem.create_disk_directories(directory)
    return directory


def fill_with_wide_directory(directory):
    """Create many directories with long names that are not UTF-8; such names take the most memory."""
    parent = os.open(directory, os.O_RDONLY)
    for number in range(20_000):
        os.mkdir(b"%05d" % number + b"\xff" * 250, dir_fd=parent)
    os.close(parent)


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_owner_change_of_a_wide_directory_uses_little_memory():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:  # on a physical disk, the removal can take a minute
        disk = Path(name)
        sandbox_filesystem.create_disk_directories(disk)
        home = disk / "home" / "agent"
        fill_with_wide_directory(home)

        assert peak_bytes(lambda: sandbox_filesystem.chown_disk(disk, UID, was_used=True)) < 2_000_000
        assert {entry.stat().st_uid for entry in os.scandir(home)} == {UID}
        assert peak_bytes(lambda: sandbox_filesystem.restore_disk_ownership(disk)) < 2_000_000
        assert {entry.stat().st_uid for entry in os.scandir(home)} == {0}


@pytest.mark.parametrize("was_used", [False, True])
def test_owner_change_affects_every_file_and_follows_no_link(disk, tmp_path, was_used):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    inner = disk / "workspace" / "-R" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    (inner / "link").symlink_to(outside)
    (disk / "tmp" / "dangling").symlink_to("nowhere")
    inside = [inner, inner.parent, *inner.iterdir(), *(disk / name for name in ("home/agent", "tmp", "tmp/dangling"))]

    sandbox_filesystem.chown_disk(disk, UID, was_used=was_used)
    assert {path.lstat().st_uid for path in inside} == {UID}

    sandbox_filesystem.restore_disk_ownership(disk)
    assert {path.lstat().st_uid for path in inside} == {0}
    assert {path.stat().st_uid for path in (outside, outside / "file")} == {0}


def test_hard_links_are_refused_until_a_sandbox_has_used_the_disk(disk):
    (disk / "workspace" / "file").touch()
    (disk / "workspace" / "same").hardlink_to(disk / "workspace" / "file")

    with pytest.raises(AttemptError, match="hard link"):
        sandbox_filesystem.chown_disk(disk, UID)
    sandbox_filesystem.chown_disk(disk, UID, was_used=True)

    assert (disk / "workspace" / "file").stat().st_uid == UID


def test_restoring_the_owner_of_a_disk_without_directories_is_not_an_error(tmp_path):
    sandbox_filesystem.restore_disk_ownership(tmp_path)


def test_link_in_place_of_a_directory_is_refused(disk, tmp_path):
    (disk / "home" / "agent").rmdir()
    (disk / "home" / "agent").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Not a directory"):
        sandbox_filesystem.chown_disk(disk, UID, was_used=True)

    (disk / "home" / "agent").unlink()
    (disk / "home").rmdir()
    (disk / "home").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Not a directory"):
        sandbox_filesystem.restore_disk_ownership(disk)


def test_only_the_home_directory_itself_belongs_to_the_agent(disk):
    sandbox_filesystem.chown_disk(disk, UID)
    assert [(disk / name).stat().st_uid for name in ("", "home", "home/agent")] == [0, 0, UID]
    assert (disk / "home").stat().st_mode & 0o777 == 0o755


def test_home_of_an_earlier_version_is_restored(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").touch()
    for path in (tmp_path / "home", tmp_path / "home" / "file"):
        os.chown(path, UID, UID)
    sandbox_filesystem.restore_disk_ownership(tmp_path)
    assert {path.stat().st_uid for path in (tmp_path / "home", tmp_path / "home" / "file")} == {0}
