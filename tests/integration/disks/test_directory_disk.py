"""Without root, the disk is a directory. Even files with restrictive modes are measured and removed."""

import subprocess
from contextlib import contextmanager

import pytest

from doubles.ordinary_user import ordinary_user_directory, run_as_ordinary_user
from sandbox.disks.commands import remove_trees
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.interfaces.task_file_layout import AttemptLayout

MIB = 1024 * 1024


async def writes_to_an_unreadable_directory(directory):
    layout = AttemptLayout(directory)
    disk = DirectoryDisk(layout)
    await disk.open(4 * MIB)
    unreadable = layout.disk / "workspace" / "unreadable"
    unreadable.mkdir(parents=True)
    (unreadable / "large").write_bytes(b"x" * 5 * MIB)
    # An agent can write to a file in a directory that the agent cannot list.
    unreadable.chmod(0o300)
    assert (await disk.measure_and_trim()).is_full


@contextmanager
def held_by_children(path, size_bytes, *, unlinks, children=1):
    """Create a file of this size and keep it open in child processes, as a runner's child processes do."""
    path.write_bytes(b"x" * size_bytes)
    command = ["sh", "-c", 'exec 3< "$1" && echo && cat', "holder", path]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(children)]
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"\n"
        if unlinks:
            path.unlink()
        yield
    finally:
        for holder in holders:
            holder.communicate()


async def keeps_a_deleted_file_open(directory):
    layout = AttemptLayout(directory)
    disk = DirectoryDisk(layout)
    await disk.open(4 * MIB)
    with held_by_children(layout.disk / "large", 5 * MIB, unlinks=True):
        usage = await disk.measure_and_trim()
        assert usage.is_full
        assert usage.used_bytes >= 5 * MIB
    assert not (await disk.measure_and_trim()).is_full


async def keeps_a_small_file_open(directory):
    layout = AttemptLayout(directory)
    disk = DirectoryDisk(layout)
    await disk.open(4 * MIB)
    with held_by_children(layout.disk / "named", 3 * MIB, unlinks=False):
        assert not (await disk.measure_and_trim()).is_full
    (layout.disk / "named").unlink()
    with held_by_children(layout.disk / "unlinked", 3 * MIB, unlinks=True, children=2):
        assert not (await disk.measure_and_trim()).is_full


async def exceeds_the_inspection_timeout(directory):
    layout = AttemptLayout(directory)
    disk = DirectoryDisk(layout)
    await disk.open(4 * MIB)
    with held_by_children(layout.disk / "large", 5 * MIB, unlinks=True), pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.directory_disk.DISK_COMMAND_TIMEOUT_SECONDS", -1)
        with pytest.raises(OSError, match="disk usage cannot be measured"):
            await disk.measure_and_trim()


async def needs_more_memory_than_allowed(directory):
    disk = DirectoryDisk(AttemptLayout(directory))
    await disk.open(4 * MIB)
    assert not (await disk.measure_and_trim()).is_full
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.directory_disk._MEASURE_BYTES_MAX", 64 * 1024)
        with pytest.raises(OSError, match="disk usage cannot be measured"):
            await disk.measure_and_trim()


async def leaves_restrictive_modes(directory):
    restricted = directory / "disk" / "node_modules" / "restricted"
    restricted.mkdir(parents=True)
    (restricted / "file").write_text("x")
    (restricted / "link").symlink_to(directory / "target")
    (directory / "target").mkdir(mode=0o500)
    restricted.chmod(0o500)
    restricted.parent.chmod(0)
    await remove_trees([directory / "disk"])
    assert [path.name for path in directory.iterdir()] == ["target"]
    assert (directory / "target").stat().st_mode & 0o777 == 0o500


async def removes_readable_files(directory):
    (directory / "disk" / "a").mkdir(parents=True)
    await remove_trees([directory / "disk"])
    await remove_trees([directory / "disk"])
    await remove_trees([])
    assert not list(directory.iterdir())


def test_files_in_an_unreadable_directory_are_counted():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(writes_to_an_unreadable_directory, directory)


def test_deleted_open_files_are_counted():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(keeps_a_deleted_file_open, directory)


def test_open_files_are_counted_once():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(keeps_a_small_file_open, directory)


def test_timeout_while_inspecting_open_files_is_an_error():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(exceeds_the_inspection_timeout, directory)


def test_memory_for_measuring_is_limited():
    """An agent can nest so many directories that du(1) needs gigabytes."""
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(needs_more_memory_than_allowed, directory)


def test_removal_handles_restrictive_modes_and_follows_no_link():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(leaves_restrictive_modes, directory)


def test_removal_of_missing_files_is_not_an_error():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(removes_readable_files, directory)
