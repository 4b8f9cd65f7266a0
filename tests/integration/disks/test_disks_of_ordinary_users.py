"""Without root a disk is a directory: what its agent closes to everybody is measured and removed all the same."""

from doubles.ordinary_user import as_ordinary_user, ordinary_place
from sandbox.contracts.layout import AttemptLayout
from sandbox.disks.plain import PlainDisks
from sandbox.disks.removal import remove

MIB = 1024 * 1024


async def hides_what_it_writes(place):
    files, disks = AttemptLayout(place), PlainDisks()
    await disks.open(files, 4 * MIB)
    hidden = files.disk / "workspace" / "hidden"
    hidden.mkdir(parents=True)
    (hidden / "large").write_bytes(b"x" * 5 * MIB)
    # Without the right to list it, the agent goes on writing in it by name.
    hidden.chmod(0o300)
    assert (await disks.use(files)).is_full


async def closes_what_it_leaves(place):
    closed = place / "disk" / "node_modules" / "closed"
    closed.mkdir(parents=True)
    (closed / "file").write_text("x")
    (closed / "link").symlink_to(place / "kept")
    (place / "kept").mkdir(mode=0o500)
    closed.chmod(0o500)
    closed.parent.chmod(0)
    await remove([place / "disk"])
    assert [path.name for path in place.iterdir()] == ["kept"]
    assert (place / "kept").stat().st_mode & 0o777 == 0o500


async def removes_what_is_open(place):
    (place / "disk" / "a").mkdir(parents=True)
    await remove([place / "disk"])
    await remove([place / "disk"])
    await remove([])
    assert not list(place.iterdir())


def test_what_an_agent_hides_on_a_plain_disk_counts():
    with ordinary_place() as place:
        as_ordinary_user(hides_what_it_writes, place)


def test_what_an_agent_closed_is_removed_and_no_link_is_followed():
    with ordinary_place() as place:
        as_ordinary_user(closes_what_it_leaves, place)


def test_what_nobody_closed_is_removed_and_what_is_gone_is_no_error():
    with ordinary_place() as place:
        as_ordinary_user(removes_what_is_open, place)
