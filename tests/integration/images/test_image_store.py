"""Images on disk: made whole or not at all, never changed, never taken from a task that uses one."""

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from doubles.image_archives import directory, entry, layer, oci_archive, small_root, symlink
from sandbox.bootstrap.doctor.examination import check_images
from sandbox.images import image_store
from sandbox.images.build import Component, build_image, import_image
from sandbox.images.catalog import ProfileCatalog
from sandbox.images.definition import ImageDefinition
from sandbox.images.errors import BuildFailedError, ImageRefusedError, ProfileBusyError, ProfileNotFoundError
from sandbox.images.image_store import ImageLeases
from sandbox.interfaces.images import IMAGE_DIRECTORIES, IMAGE_FILES, Image, ImageUnusableError
from sandbox.model.errors import AttemptError

LOADER = {"aarch64": "usr/lib/ld-linux-aarch64.so.1"}.get(os.uname().machine, "usr/lib64/ld-linux-x86-64.so.2")
DECLARED = ImageDefinition("tools", date(2026, 11, 1), files={"/etc/motd": "hello\n"})


@pytest.fixture(scope="module")
def root_layer():
    """A small root, in which nothing is started."""
    return small_root(is_hollow=True)


@pytest.fixture
def catalog(tmp_path):
    """The profiles of an empty data directory."""
    return ProfileCatalog(tmp_path / "data")


@pytest.fixture
def brought(root_layer):
    """What takes mmdebstrap's place: it brings the small root, and further files."""

    def bring(**files):
        def add(declaration, tree, scratch):
            from sandbox.images.oci.layer import apply_layer
            from sandbox.images.oci.tar_stream import ByteBudget, TarStream

            more = layer(*(entry(name.replace("__", "/"), content) for name, content in files.items()))
            for one in (root_layer, more):
                apply_layer(TarStream(io.BytesIO(one), ByteBudget(1 << 30)), tree)

        return add

    return bring


def build(catalog, add, name="tools", declaration=DECLARED, parts=None):
    return build_image(catalog.image_store(name), declaration, parts or {}, add)


def images(catalog, name="tools"):
    image_store = catalog.image_store(name)
    return sorted(path.name for path in image_store.rootfs_path("").parent.iterdir() if len(path.name) == 64)


def image_of(catalog, name="tools", tier="namespaces"):
    return catalog.find_image(name, tier)


def test_a_built_image_is_what_the_profile_stands_for(catalog, brought):
    record = build(catalog, brought())
    image = image_of(catalog)
    assert image == Image("tools", record.digest, str(catalog.image_store("tools").rootfs_path(record.digest)))
    assert image.name == f"tools@{record.digest}"
    motd = catalog.image_store("tools").rootfs_path(record.digest) / "etc/motd"
    assert (motd.read_text(), motd.stat().st_mtime) == ("hello\n", 1793491200)


def test_an_image_has_places_to_mount_over_and_no_passwords(catalog, root_layer, tmp_path):
    odd = layer(
        symlink("tmp", "/etc"), symlink("etc/resolv.conf", "/run/x"), symlink("home", "/root"), directory("etc/hosts")
    )
    record = import_image(catalog.image_store("tools"), oci_archive(tmp_path / "image.tar", root_layer, odd))
    root = catalog.image_store("tools").rootfs_path(record.digest)
    for path in IMAGE_DIRECTORIES:
        assert (root / path[1:]).is_dir()
        assert not (root / path[1:]).is_symlink()
    for path in IMAGE_FILES:
        assert (root / path[1:]).read_bytes() == b""
        assert not (root / path[1:]).is_symlink()
    assert not (root / "etc/shadow").exists()
    assert (root / "var/tmp").readlink().as_posix() == "../tmp"


def test_building_twice_gives_the_same_image(catalog, brought, tmp_path):
    one = build(catalog, brought())
    again = build(catalog, brought())
    elsewhere = build(ProfileCatalog(tmp_path / "elsewhere"), brought())
    assert {again.digest, elsewhere.digest} == {one.digest}
    assert build(catalog, brought(etc__other=b"x")).digest != one.digest


def test_the_same_files_may_be_asked_to_run_in_a_stronger_tier(catalog, brought):
    build(catalog, brought())
    assert image_of(catalog)
    stronger = ImageDefinition("tools", DECLARED.date, files=DECLARED.files, minimum_tier="vm")
    build(catalog, brought(), declaration=stronger)
    with pytest.raises(ImageUnusableError, match="vm"):
        image_of(catalog)
    assert image_of(catalog, tier="vm")
    assert catalog.list_profiles()["tools"] == "vm"


def test_a_part_of_sandbox_is_copied(catalog, brought, tmp_path):
    source = tmp_path / "node"
    (source / "lib").mkdir(parents=True)
    (source / "lib" / "code.js").write_text("1")
    (source / "link").symlink_to("lib")
    part = Component({source: "/opt/node"}, {"/opt/node/bin": "lib"}, {"/opt/node/rc": b"x"}, {"node": "v1"})
    wanting = ImageDefinition("tools", DECLARED.date, parts=("node",))
    record = build(catalog, brought(), declaration=wanting, parts={"node": part})
    root = catalog.image_store("tools").rootfs_path(record.digest) / "opt/node"
    assert (root / "lib/code.js").read_text() == "1"
    assert [(root / name).readlink().as_posix() for name in ("link", "bin")] == ["lib", "lib"]
    assert record.versions["node"] == "v1"
    with pytest.raises(BuildFailedError, match="node"):
        build(catalog, brought(), declaration=wanting)


def test_a_build_that_fails_changes_nothing(catalog, brought):
    first = build(catalog, brought())

    def fail(declaration, tree, scratch):
        tree.add_directory("usr")
        raise BuildFailedError("no packages")

    with pytest.raises(BuildFailedError):
        build(catalog, fail)
    assert image_of(catalog).digest == first.digest
    assert images(catalog) == [first.digest[7:]]


@pytest.mark.parametrize("program", ["exit 1", "exec sleep 60"])
def test_a_disk_that_does_not_take_an_image_leaves_the_one_before(catalog, brought, tmp_path, monkeypatch, program):
    first = build(catalog, brought())
    sync = tmp_path / "sync"
    sync.write_text(f"#!/bin/sh\n{program}\n")
    sync.chmod(0o755)
    monkeypatch.setattr(image_store, "_SYNC", str(sync))
    monkeypatch.setattr(image_store, "SYNC_SECONDS", 0.5)
    with pytest.raises(OSError, match="could not be flushed"):
        build(catalog, brought(etc__other=b"x"))
    assert image_of(catalog).digest == first.digest
    monkeypatch.undo()
    assert build(catalog, brought(etc__other=b"x")).digest != first.digest


@pytest.mark.parametrize("missing", ["usr/bin/sh", LOADER])
def test_an_image_in_which_the_agent_cannot_start_is_refused(catalog, root_layer, tmp_path, missing):
    folder, _, name = missing.rpartition("/")
    path = oci_archive(tmp_path / "image.tar", root_layer, layer(entry(f"{folder}/.wh.{name}")))
    with pytest.raises(ImageRefusedError, match="Claude Code"):
        import_image(catalog.image_store("tools"), path)
    assert catalog.names() == ["agentic-dev", "basic"]


KILLED = """
import sys, time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from pathlib import Path
from sandbox.images.build import build_image
from sandbox.images.catalog import ProfileCatalog
from sandbox.images.definition import ImageDefinition

def add(declaration, tree, scratch):
    tree.add_directory("usr/half")
    print("half", flush=True)
    time.sleep(60)

build_image(ProfileCatalog(Path(sys.argv[1])).image_store("tools"), ImageDefinition("x", date(2026, 1, 1)), {}, add)
"""


def test_a_build_that_is_killed_leaves_nothing_that_counts(catalog, brought, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "data")], stdout=subprocess.PIPE)
    assert killed.stdout.readline() == b"half\n"
    with pytest.raises(ProfileBusyError):
        build(catalog, brought())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert "tools" not in catalog.names()
    record = build(catalog, brought())
    root = catalog.image_store("tools").rootfs_path(record.digest)
    assert not (root / "usr/half").exists()
    assert sorted(path.name for path in root.parent.parent.iterdir()) == sorted([record.digest[7:], "current"])


HOLDER = """
import sys
from pathlib import Path
from sandbox.interfaces.images import Image
from sandbox.images.image_store import ImageLeases

ImageLeases(Path(sys.argv[1])).acquire(Image("tools", sys.argv[2], ""))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """A process that holds an image, as a runner does, until it is ended."""
    started = []

    def hold(record):
        argv = [sys.executable, "-c", HOLDER, str(tmp_path / "data"), record.digest]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_task_keeps_its_image_while_new_ones_replace_it(catalog, brought, hold):
    used = build(catalog, brought(etc__one=b"1"))
    holder = hold(used)
    for number in (b"2", b"3", b"4"):
        newest = build(catalog, brought(etc__other=number))
        assert image_of(catalog).digest == newest.digest
    assert (catalog.image_store("tools").rootfs_path(used.digest) / "etc/one").read_bytes() == b"1"
    holder.kill()
    holder.wait()
    last = build(catalog, brought(etc__other=b"5"))
    assert images(catalog) == sorted([newest.digest[7:], last.digest[7:]])


def test_an_image_that_a_task_was_told_of_outlives_the_build_that_replaces_it(catalog, brought, tmp_path):
    build(catalog, brought(etc__one=b"1"))
    told = image_of(catalog)
    build(catalog, brought(etc__one=b"2"))
    ImageLeases(tmp_path / "data").acquire(told)


def test_an_image_in_use_is_not_removed(catalog, brought, hold):
    record = build(catalog, brought())
    holder = hold(record)
    with pytest.raises(ProfileBusyError, match="task"):
        catalog.image_store("tools").remove_images()
    assert image_of(catalog).digest == record.digest
    holder.kill()
    holder.wait()
    catalog.image_store("tools").remove_images()
    assert "tools" not in catalog.names()


def test_a_build_does_not_come_between_a_task_and_the_current_image(catalog, brought, monkeypatch):
    build(catalog, brought(etc__one=b"1"))
    current = build(catalog, brought(etc__one=b"2"))
    locked, held = [], image_store._try_lock

    def watched(directory, kind):
        locked.append(directory.name)
        return held(directory, kind)

    monkeypatch.setattr(image_store, "_try_lock", watched)
    build(catalog, brought(etc__one=b"2"))
    assert len(locked) == 2
    assert current.digest[7:] not in locked


def test_a_task_tries_again_where_a_removal_that_is_refused_locks_its_image_for_an_instant(
    catalog, brought, tmp_path, monkeypatch
):
    build(catalog, brought())
    told = image_of(catalog)
    remover = os.open(catalog.image_store("tools").rootfs_path(told.digest).parent, os.O_RDONLY)
    fcntl.flock(remover, fcntl.LOCK_EX)
    with pytest.raises(AttemptError, match="is being removed"):
        ImageLeases(tmp_path / "data").acquire(told)
    monkeypatch.setattr(image_store.time, "sleep", lambda _: fcntl.flock(remover, fcntl.LOCK_UN))
    ImageLeases(tmp_path / "data").acquire(told)
    os.close(remover)


def test_an_image_that_is_gone_cannot_be_held(catalog, brought, tmp_path):
    build(catalog, brought())
    told = image_of(catalog)
    catalog.image_store("tools").remove_images()
    with pytest.raises(AttemptError, match="tools"):
        ImageLeases(tmp_path / "data").acquire(told)
    with pytest.raises(ImageUnusableError, match="tools"):
        image_of(catalog)
    with pytest.raises(ProfileNotFoundError):
        catalog.image_store("tools").remove_images()


def test_a_shipped_profile_without_an_image_is_the_hosts_own(catalog, brought):
    assert catalog.list_profiles() == {"agentic-dev": "", "basic": ""}
    assert image_of(catalog, "basic") is None
    record = build(catalog, brought(), name="basic")
    assert image_of(catalog, "basic").digest == record.digest
    catalog.image_store("basic").remove_images()
    assert image_of(catalog, "basic") is None


@pytest.mark.parametrize("damage", ["record", "pointer", "tree", "another layout", "a pointer that leads away"])
def test_a_damaged_image_is_never_replaced_by_the_hosts_own(catalog, brought, damage):
    record = build(catalog, brought(), name="basic")
    image = catalog.image_store("basic").rootfs_path(record.digest).parent
    match damage:
        case "record":
            (image / "record.json").write_text("{")
        case "pointer":
            (image.parent / "current").write_text("0" * 64)
        case "tree":
            (image / "root").rename(image / "elsewhere")
        case "another layout":
            text = (image / "record.json").read_text()
            (image / "record.json").write_text(text.replace('"layout": 1', '"layout": 0'))
        case _:
            (image.parent / "current").write_text(f"../basic/{image.name}")
    with pytest.raises(ImageUnusableError, match="build it again"):
        image_of(catalog, "basic")
    assert "basic" in catalog.list_profiles()


@pytest.mark.parametrize("name", ["tools~", "Tools", "host", "a b", "tools..old"])
def test_a_directory_that_no_profile_is_called_as_is_none_and_hides_none(catalog, brought, tmp_path, name):
    build(catalog, brought())
    profiles = tmp_path / "data" / "profiles"
    shutil.copytree(profiles / "tools", profiles / name, symlinks=True)
    assert catalog.names() == ["agentic-dev", "basic", "tools"]
    assert set(catalog.list_profiles()) == {"agentic-dev", "basic", "tools"}
    with pytest.raises(ProfileNotFoundError, match="there are: agentic-dev, basic, tools"):
        catalog.find(name)
    with pytest.raises(ImageUnusableError):
        catalog.find_image(name, "host")


def test_a_profile_of_which_nobody_can_read_what_is_current_is_unusable_and_hides_none(catalog, brought, tmp_path):
    build(catalog, brought())
    current = tmp_path / "data" / "profiles" / "tools" / "current"
    current.unlink()
    current.mkdir()
    assert set(catalog.list_profiles()) == {"agentic-dev", "basic", "tools"}
    assert "cannot be read" in catalog.find("tools").problem
    with pytest.raises(ImageUnusableError, match="sandbox profile build tools"):
        catalog.find_image("tools", "host")


def test_a_profile_that_goes_while_all_are_looked_at_is_not_offered(catalog, brought, monkeypatch):
    build(catalog, brought())
    names = catalog.names()
    catalog.image_store("tools").remove_images()
    monkeypatch.setattr(catalog, "names", lambda: names)
    assert set(catalog.list_profiles()) == {"agentic-dev", "basic"}


def test_building_again_keeps_all_images_while_nobody_can_read_which_one_is_current(catalog, brought, tmp_path):
    record = build(catalog, brought())
    current = tmp_path / "data" / "profiles" / "tools" / "current"
    current.unlink()
    current.mkdir()
    with catalog.image_store("tools").build_directory():
        assert catalog.image_store("tools").rootfs_path(record.digest).is_dir()


DAMAGES = {
    "the record is lost": lambda image: (image / "record.json").unlink(),
    "the record is cut off": lambda image: (image / "record.json").write_text("{"),
    "the tree is lost": lambda image: shutil.rmtree(image / "root"),
    "a file of the tree is lost": lambda image: (image / "root/etc/one").unlink(),
    "a file of the tree is another": lambda image: (image / "root/etc/one").write_bytes(b"2"),
    "the pointer is no text": lambda image: (image.parent / "current").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_building_again_mends_a_damaged_image(catalog, brought, damage):
    record = build(catalog, brought(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    damage(image)
    assert build(catalog, brought(etc__one=b"1")).digest == record.digest
    assert image_of(catalog).digest == record.digest
    assert (image / "root/etc/one").read_bytes() == b"1"
    assert sorted(path.name for path in image.parent.iterdir()) == sorted([image.name, "current"])


def test_building_again_keeps_a_whole_image_and_its_date_for_the_task_that_uses_it(catalog, brought, hold):
    record = build(catalog, brought())
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    older = record.created_at - timedelta(days=1)
    (image / "record.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(record, created_at=older)))
    inode = image.stat().st_ino
    hold(record)
    assert build(catalog, brought()).created_at == older
    assert image.stat().st_ino == inode


def test_a_damaged_image_is_not_mended_under_the_task_that_uses_it(catalog, brought, hold):
    record = build(catalog, brought(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    (image / "root/etc/one").unlink()
    holder = hold(record)
    with pytest.raises(ProfileBusyError, match="damaged"):
        build(catalog, brought(etc__one=b"1"))
    assert image.is_dir()
    holder.kill()
    holder.wait()
    build(catalog, brought(etc__one=b"1"))
    assert (image / "root/etc/one").read_bytes() == b"1"


def test_a_build_that_ends_while_it_mends_is_mended_by_the_next(catalog, brought, monkeypatch):
    record = build(catalog, brought(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    (image / "root/etc/one").unlink()
    rename = Path.rename

    def die(path, target):
        if target == image:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        patched.setattr(image_store, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
        with pytest.raises(KeyboardInterrupt):
            build(catalog, brought(etc__one=b"1"))
    with pytest.raises(ImageUnusableError, match="build it again"):
        image_of(catalog)
    build(catalog, brought(etc__one=b"1"))
    assert (image / "root/etc/one").read_bytes() == b"1"
    assert sorted(path.name for path in image.parent.iterdir()) == sorted([image.name, "current"])


def test_doctor_tells_what_is_in_the_sandboxes(catalog, brought, tmp_path):
    settings = SimpleNamespace(server=SimpleNamespace(data_dir=tmp_path / "data"))
    record = build(catalog, brought(), name="basic")
    host = "agentic-dev: the host's own /usr; no image is built"
    assert [(one.ok, one.message) for one in check_images(settings)] == [
        (True, host),
        (True, f"basic: image {record.digest}"),
    ]
    (catalog.image_store("basic").rootfs_path(record.digest).parent / "record.json").unlink()
    assert [(one.ok, one.mend) for one in check_images(settings)] == [
        (True, ""),
        (False, "sandbox profile build basic"),
    ]


def test_of_two_builds_at_once_one_is_refused(catalog, brought):
    begun, goes_on = threading.Event(), threading.Event()
    bring = brought()

    def slow(*arguments):
        begun.set()
        assert goes_on.wait(30)
        bring(*arguments)

    other = threading.Thread(target=build, args=(catalog, slow))
    other.start()
    assert begun.wait(30)
    with pytest.raises(ProfileBusyError):
        build(catalog, bring)
    with pytest.raises(ProfileBusyError):
        catalog.image_store("tools").remove_images()
    goes_on.set()
    other.join(30)
    assert image_of(catalog)


def test_an_image_can_be_read_whatever_the_mask_is(catalog, brought):
    before = os.umask(0o077)
    try:
        record = build(catalog, brought())
    finally:
        os.umask(before)
    root = catalog.image_store("tools").rootfs_path(record.digest)
    assert {path.stat().st_mode & 0o777 for path in (root, root / "etc", root / "opt") if path.exists()} == {0o755}
