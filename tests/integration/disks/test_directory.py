"""Without root a disk is a directory: what its agent closes to everybody is measured and removed all the same."""

import subprocess
from contextlib import contextmanager

import pytest

from doubles.ordinary_user import as_ordinary_user, ordinary_place
from sandbox.disks.directory import DirectoryDisks
from sandbox.disks.removal import remove_trees
from sandbox.interfaces.layout import AttemptLayout

MIB = 1024 * 1024


async def hides_what_it_writes(place):
    files, disks = AttemptLayout(place), DirectoryDisks()
    await disks.open(files, 4 * MIB)
    hidden = files.disk / "workspace" / "hidden"
    hidden.mkdir(parents=True)
    (hidden / "large").write_bytes(b"x" * 5 * MIB)
    # Without the right to list it, the agent goes on writing in it by name.
    hidden.chmod(0o300)
    assert (await disks.usage(files)).is_full


@contextmanager
def held_by_children(path, size_bytes, *, unlinks, children=1):
    """A new file of this size that processes have open, as a sandbox's are below its runner."""
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


async def holds_what_it_has_unlinked(place):
    files, disks = AttemptLayout(place), DirectoryDisks()
    await disks.open(files, 4 * MIB)
    with held_by_children(files.disk / "large", 5 * MIB, unlinks=True):
        use = await disks.usage(files)
        assert use.is_full
        assert use.used_bytes >= 5 * MIB
    assert not (await disks.usage(files)).is_full


async def holds_what_fits(place):
    files, disks = AttemptLayout(place), DirectoryDisks()
    await disks.open(files, 4 * MIB)
    with held_by_children(files.disk / "named", 3 * MIB, unlinks=False):
        assert not (await disks.usage(files)).is_full
    (files.disk / "named").unlink()
    with held_by_children(files.disk / "unlinked", 3 * MIB, unlinks=True, children=2):
        assert not (await disks.usage(files)).is_full


async def opens_more_than_can_be_looked_at(place):
    files, disks = AttemptLayout(place), DirectoryDisks()
    await disks.open(files, 4 * MIB)
    with held_by_children(files.disk / "large", 5 * MIB, unlinks=True), pytest.MonkeyPatch.context() as patched:
        patched.setattr("sandbox.disks.directory.DISK_COMMAND_SECONDS", -1)
        with pytest.raises(OSError, match="cannot be told how full"):
            await disks.usage(files)


async def closes_what_it_leaves(place):
    closed = place / "disk" / "node_modules" / "closed"
    closed.mkdir(parents=True)
    (closed / "file").write_text("x")
    (closed / "link").symlink_to(place / "kept")
    (place / "kept").mkdir(mode=0o500)
    closed.chmod(0o500)
    closed.parent.chmod(0)
    await remove_trees([place / "disk"])
    assert [path.name for path in place.iterdir()] == ["kept"]
    assert (place / "kept").stat().st_mode & 0o777 == 0o500


async def removes_what_is_open(place):
    (place / "disk" / "a").mkdir(parents=True)
    await remove_trees([place / "disk"])
    await remove_trees([place / "disk"])
    await remove_trees([])
    assert not list(place.iterdir())


def test_what_an_agent_hides_on_a_plain_disk_counts():
    with ordinary_place() as place:
        as_ordinary_user(hides_what_it_writes, place)


def test_what_is_unlinked_and_still_open_on_a_plain_disk_counts():
    with ordinary_place() as place:
        as_ordinary_user(holds_what_it_has_unlinked, place)


def test_what_is_open_on_a_plain_disk_counts_once():
    with ordinary_place() as place:
        as_ordinary_user(holds_what_fits, place)


def test_a_plain_disk_with_too_much_open_to_look_at_is_an_error():
    with ordinary_place() as place:
        as_ordinary_user(opens_more_than_can_be_looked_at, place)


def test_what_an_agent_closed_is_removed_and_no_link_is_followed():
    with ordinary_place() as place:
        as_ordinary_user(closes_what_it_leaves, place)


def test_what_nobody_closed_is_removed_and_what_is_gone_is_no_error():
    with ordinary_place() as place:
        as_ordinary_user(removes_what_is_open, place)
