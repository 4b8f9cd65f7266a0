"""Images on disk: created atomically, never changed, and never removed while a task uses them."""

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

from doubles.image_archives import directory, entry, layer, minimal_root, oci_archive, symlink
from sandbox.bootstrap.doctor.host_checks import check_images
from sandbox.images import image_store
from sandbox.images.image_builder import Component, build_image, import_image
from sandbox.images.image_store import ImageLocks
from sandbox.images.profiles import ImageDefinition, ProfileCatalog
from sandbox.interfaces.images import (
    MOUNT_POINT_DIRECTORIES,
    MOUNT_POINT_FILES,
    BuildFailedError,
    Image,
    ImageRefusedError,
    ImageUnusableError,
    ProfileBusyError,
    ProfileNotFoundError,
)
from sandbox.model.failure import AttemptError

LOADER = {"aarch64": "usr/lib/ld-linux-aarch64.so.1"}.get(os.uname().machine, "usr/lib64/ld-linux-x86-64.so.2")
DEFINITION = ImageDefinition("tools", date(2026, 11, 1), files={"/etc/motd": "hello\n"})


@pytest.fixture(scope="module")
def root_layer():
    """A layer with a small root file system whose programs are never started."""
    return minimal_root(is_truncated=True)


@pytest.fixture
def catalog(tmp_path):
    """The profiles of an empty data directory."""
    return ProfileCatalog(tmp_path / "data")


@pytest.fixture
def fake_packages(root_layer):
    """A replacement for mmdebstrap that installs the small root file system and additional files."""

    def install(**files):
        def add(definition, tree, scratch):
            from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer

            extra = layer(*(entry(name.replace("__", "/"), content) for name, content in files.items()))
            for archive in (root_layer, extra):
                apply_layer(TarStream(io.BytesIO(archive), ByteBudget(1 << 30)), tree)

        return add

    return install


def build(catalog, add, name="tools", definition=DEFINITION, components=None):
    return build_image(catalog.image_store(name), definition, components or {}, add)


def images(catalog, name="tools"):
    directory = catalog.image_store(name).rootfs_path("0" * 64).parent.parent
    return sorted(path.name for path in directory.iterdir() if len(path.name) == 64)


def image_of(catalog, name="tools", tier="namespaces"):
    return catalog.find_image(name, tier)


def test_profile_resolves_to_its_built_image(catalog, fake_packages):
    record = build(catalog, fake_packages())
    image = image_of(catalog)
    assert image == Image("tools", record.digest, str(catalog.image_store("tools").rootfs_path(record.digest)))
    assert image.name == f"tools@{record.digest}"
    motd_path = catalog.image_store("tools").rootfs_path(record.digest) / "etc/motd"
    assert (motd_path.read_text(), motd_path.stat().st_mtime) == ("hello\n", 1793491200)


def test_image_has_mount_points_and_no_passwords(catalog, root_layer, tmp_path):
    special_layer = layer(
        symlink("tmp", "/etc"), symlink("etc/resolv.conf", "/run/x"), symlink("home", "/root"), directory("etc/hosts")
    )
    record = import_image(catalog.image_store("tools"), oci_archive(tmp_path / "image.tar", root_layer, special_layer))
    root = catalog.image_store("tools").rootfs_path(record.digest)
    for path in MOUNT_POINT_DIRECTORIES:
        assert (root / path[1:]).is_dir()
        assert not (root / path[1:]).is_symlink()
    for path in MOUNT_POINT_FILES:
        assert (root / path[1:]).read_bytes() == b""
        assert not (root / path[1:]).is_symlink()
    assert not (root / "etc/shadow").exists()
    assert (root / "var/tmp").readlink().as_posix() == "../tmp"


def test_build_is_reproducible(catalog, fake_packages, tmp_path):
    first = build(catalog, fake_packages())
    second = build(catalog, fake_packages())
    elsewhere = build(ProfileCatalog(tmp_path / "elsewhere"), fake_packages())
    assert {second.digest, elsewhere.digest} == {first.digest}
    assert build(catalog, fake_packages(etc__other=b"x")).digest != first.digest


def test_rebuild_can_raise_the_minimum_tier(catalog, fake_packages):
    build(catalog, fake_packages())
    assert image_of(catalog)
    stronger = ImageDefinition("tools", DEFINITION.snapshot_date, files=DEFINITION.files, minimum_tier="vm")
    build(catalog, fake_packages(), definition=stronger)
    with pytest.raises(ImageUnusableError, match="vm"):
        image_of(catalog)
    assert image_of(catalog, tier="vm")
    assert catalog.list_minimum_tiers()["tools"] == "vm"


def test_component_is_copied_into_the_image(catalog, fake_packages, tmp_path):
    source = tmp_path / "node"
    (source / "lib").mkdir(parents=True)
    (source / "lib" / "code.js").write_text("1")
    (source / "link").symlink_to("lib")
    component = Component({source: "/opt/node"}, {"/opt/node/bin": "lib"}, {"/opt/node/rc": b"x"}, {"node": "v1"})
    with_node = ImageDefinition("tools", DEFINITION.snapshot_date, components=("node",))
    record = build(catalog, fake_packages(), definition=with_node, components={"node": component})
    root = catalog.image_store("tools").rootfs_path(record.digest) / "opt/node"
    assert (root / "lib/code.js").read_text() == "1"
    assert [(root / name).readlink().as_posix() for name in ("link", "bin")] == ["lib", "lib"]
    assert record.package_versions["node"] == "v1"
    with pytest.raises(BuildFailedError, match="node"):
        build(catalog, fake_packages(), definition=with_node)


def test_failed_build_preserves_the_current_image(catalog, fake_packages):
    first = build(catalog, fake_packages())

    def fail(definition, tree, scratch):
        tree.add_directory("usr")
        raise BuildFailedError("no packages")

    with pytest.raises(BuildFailedError):
        build(catalog, fail)
    assert image_of(catalog).digest == first.digest
    assert images(catalog) == [first.digest[7:]]


@pytest.mark.parametrize("program", ["exit 1", "exec sleep 60"])
def test_flush_error_preserves_the_current_image(catalog, fake_packages, tmp_path, monkeypatch, program):
    first = build(catalog, fake_packages())
    sync = tmp_path / "sync"
    sync.write_text(f"#!/bin/sh\n{program}\n")
    sync.chmod(0o755)
    monkeypatch.setattr(image_store, "_SYNC", str(sync))
    monkeypatch.setattr(image_store, "SYNC_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(OSError, match="could not be flushed"):
        build(catalog, fake_packages(etc__other=b"x"))
    assert image_of(catalog).digest == first.digest
    monkeypatch.undo()
    assert build(catalog, fake_packages(etc__other=b"x")).digest != first.digest


@pytest.mark.parametrize("missing", ["usr/bin/sh", LOADER])
def test_image_that_lacks_requirements_of_the_agent_is_refused(catalog, root_layer, tmp_path, missing):
    folder, _, name = missing.rpartition("/")
    path = oci_archive(tmp_path / "image.tar", root_layer, layer(entry(f"{folder}/.wh.{name}")))
    with pytest.raises(ImageRefusedError, match="agents need a shell and the GNU C library"):
        import_image(catalog.image_store("tools"), path)
    assert catalog.names() == ["agentic-dev", "basic"]


KILLED_BUILD_PROGRAM = """
import sys, time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from pathlib import Path
from sandbox.images.image_builder import build_image
from sandbox.images.profiles import ProfileCatalog
from sandbox.images.profiles import ImageDefinition

def add(definition, tree, scratch):
    tree.add_directory("usr/half")
    print("half", flush=True)
    time.sleep(60)

build_image(ProfileCatalog(Path(sys.argv[1])).image_store("tools"), ImageDefinition("x", date(2026, 1, 1)), {}, add)
"""


def test_killed_build_leaves_no_image(catalog, fake_packages, tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED_BUILD_PROGRAM, str(tmp_path / "data")], stdout=subprocess.PIPE
    )
    assert killed.stdout.readline() == b"half\n"
    with pytest.raises(ProfileBusyError):
        build(catalog, fake_packages())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert "tools" not in catalog.names()
    record = build(catalog, fake_packages())
    root = catalog.image_store("tools").rootfs_path(record.digest)
    assert not (root / "usr/half").exists()
    assert sorted(path.name for path in root.parent.parent.iterdir()) == sorted([record.digest[7:], "current"])


IMAGE_HOLDER_PROGRAM = """
import sys
from pathlib import Path
from sandbox.interfaces.images import Image
from sandbox.images.image_store import ImageLocks

ImageLocks(Path(sys.argv[1])).acquire(Image("tools", sys.argv[2], ""))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold_image(tmp_path):
    """A process that holds an image, as a runner does, until the test ends."""
    started = []

    def hold_image(record):
        argv = [sys.executable, "-c", IMAGE_HOLDER_PROGRAM, str(tmp_path / "data"), record.digest]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold_image
    for process in started:
        process.kill()
        process.communicate()


def test_image_in_use_survives_new_builds(catalog, fake_packages, hold_image):
    used = build(catalog, fake_packages(etc__one=b"1"))
    holder = hold_image(used)
    for number in (b"2", b"3", b"4"):
        newest = build(catalog, fake_packages(etc__other=number))
        assert image_of(catalog).digest == newest.digest
    assert (catalog.image_store("tools").rootfs_path(used.digest) / "etc/one").read_bytes() == b"1"
    holder.kill()
    holder.wait()
    last = build(catalog, fake_packages(etc__other=b"5"))
    assert images(catalog) == sorted([newest.digest[7:], last.digest[7:]])


def test_resolved_image_survives_the_next_build(catalog, fake_packages, tmp_path):
    build(catalog, fake_packages(etc__one=b"1"))
    image = image_of(catalog)
    build(catalog, fake_packages(etc__one=b"2"))
    ImageLocks(tmp_path / "data").acquire(image)


def test_image_in_use_is_not_removed(catalog, fake_packages, hold_image):
    record = build(catalog, fake_packages())
    holder = hold_image(record)
    with pytest.raises(ProfileBusyError, match="task"):
        catalog.image_store("tools").remove_images()
    assert image_of(catalog).digest == record.digest
    holder.kill()
    holder.wait()
    catalog.image_store("tools").remove_images()
    assert "tools" not in catalog.names()


def test_build_does_not_lock_the_current_image(catalog, fake_packages, monkeypatch):
    build(catalog, fake_packages(etc__one=b"1"))
    current = build(catalog, fake_packages(etc__one=b"2"))
    locked, try_lock = [], image_store._try_lock

    def record_lock(directory, kind):
        locked.append(directory.name)
        return try_lock(directory, kind)

    monkeypatch.setattr(image_store, "_try_lock", record_lock)
    build(catalog, fake_packages(etc__one=b"2"))
    assert len(locked) == 2
    assert current.digest[7:] not in locked


def test_acquiring_an_image_is_retried_until_a_refused_removal_ends(catalog, fake_packages, tmp_path, monkeypatch):
    build(catalog, fake_packages())
    image = image_of(catalog)
    remover = os.open(catalog.image_store("tools").rootfs_path(image.digest).parent, os.O_RDONLY)
    fcntl.flock(remover, fcntl.LOCK_EX)
    with pytest.raises(AttemptError, match="is being removed"):
        ImageLocks(tmp_path / "data").acquire(image)
    monkeypatch.setattr(image_store.time, "sleep", lambda _: fcntl.flock(remover, fcntl.LOCK_UN))
    ImageLocks(tmp_path / "data").acquire(image)
    os.close(remover)


def test_removed_image_cannot_be_acquired(catalog, fake_packages, tmp_path):
    build(catalog, fake_packages())
    image = image_of(catalog)
    catalog.image_store("tools").remove_images()
    with pytest.raises(AttemptError, match="tools"):
        ImageLocks(tmp_path / "data").acquire(image)
    with pytest.raises(ImageUnusableError, match="tools"):
        image_of(catalog)
    with pytest.raises(ProfileNotFoundError):
        catalog.image_store("tools").remove_images()


def test_shipped_profile_without_an_image_uses_the_host_root(catalog, fake_packages):
    assert catalog.list_minimum_tiers() == {"agentic-dev": "", "basic": ""}
    assert image_of(catalog, "basic") is None
    record = build(catalog, fake_packages(), name="basic")
    assert image_of(catalog, "basic").digest == record.digest
    catalog.image_store("basic").remove_images()
    assert image_of(catalog, "basic") is None


@pytest.mark.parametrize(
    "damage", ["record", "pointer", "tree", "a different layout", "a pointer to a path outside the directory"]
)
def test_damaged_image_is_not_replaced_by_the_host_root(catalog, fake_packages, damage):
    record = build(catalog, fake_packages(), name="basic")
    image = catalog.image_store("basic").rootfs_path(record.digest).parent
    match damage:
        case "record":
            (image / "record.json").write_text("{")
        case "pointer":
            (image.parent / "current").write_text("0" * 64)
        case "tree":
            (image / "root").rename(image / "elsewhere")
        case "a different layout":
            text = (image / "record.json").read_text()
            (image / "record.json").write_text(text.replace('"layout": 1', '"layout": 0'))
        case _:
            (image.parent / "current").write_text(f"../basic/{image.name}")
    with pytest.raises(ImageUnusableError, match="build it again"):
        image_of(catalog, "basic")
    assert "basic" in catalog.list_minimum_tiers()


@pytest.mark.parametrize("name", ["tools~", "Tools", "host", "a b", "tools..old"])
def test_directory_with_an_invalid_profile_name_is_ignored(catalog, fake_packages, tmp_path, name):
    build(catalog, fake_packages())
    profiles = tmp_path / "data" / "profiles"
    shutil.copytree(profiles / "tools", profiles / name, symlinks=True)
    assert catalog.names() == ["agentic-dev", "basic", "tools"]
    assert set(catalog.list_minimum_tiers()) == {"agentic-dev", "basic", "tools"}
    with pytest.raises(ProfileNotFoundError, match="available profiles: agentic-dev, basic, tools"):
        catalog.find(name)
    with pytest.raises(ImageUnusableError):
        catalog.find_image(name, "host")


def test_profile_with_an_unreadable_pointer_is_unusable(catalog, fake_packages, tmp_path):
    build(catalog, fake_packages())
    current = tmp_path / "data" / "profiles" / "tools" / "current"
    current.unlink()
    current.mkdir()
    assert set(catalog.list_minimum_tiers()) == {"agentic-dev", "basic", "tools"}
    assert "cannot be read" in catalog.find("tools").problem
    with pytest.raises(ImageUnusableError, match="sandbox profile build tools"):
        catalog.find_image("tools", "host")


def test_profile_removed_during_listing_is_skipped(catalog, fake_packages, monkeypatch):
    build(catalog, fake_packages())
    names = catalog.names()
    catalog.image_store("tools").remove_images()
    monkeypatch.setattr(catalog, "names", lambda: names)
    assert set(catalog.list_minimum_tiers()) == {"agentic-dev", "basic"}


def test_build_with_an_unreadable_pointer_removes_no_image(catalog, fake_packages, tmp_path):
    record = build(catalog, fake_packages())
    current = tmp_path / "data" / "profiles" / "tools" / "current"
    current.unlink()
    current.mkdir()
    with catalog.image_store("tools").build_directory():
        assert catalog.image_store("tools").rootfs_path(record.digest).is_dir()


DAMAGES = {
    "the record is lost": lambda image: (image / "record.json").unlink(),
    "the record is cut off": lambda image: (image / "record.json").write_text("{"),
    "the tree is lost": lambda image: shutil.rmtree(image / "root"),
    "a file in the tree is missing": lambda image: (image / "root/etc/one").unlink(),
    "a file in the tree is modified": lambda image: (image / "root/etc/one").write_bytes(b"2"),
    "the pointer is not text": lambda image: (image.parent / "current").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_rebuild_repairs_a_damaged_image(catalog, fake_packages, damage):
    record = build(catalog, fake_packages(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    damage(image)
    assert build(catalog, fake_packages(etc__one=b"1")).digest == record.digest
    assert image_of(catalog).digest == record.digest
    assert (image / "root/etc/one").read_bytes() == b"1"
    assert sorted(path.name for path in image.parent.iterdir()) == sorted([image.name, "current"])


def test_rebuild_preserves_an_intact_image_and_its_date(catalog, fake_packages, hold_image):
    record = build(catalog, fake_packages())
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    older = record.created_at - timedelta(days=1)
    (image / "record.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(record, created_at=older)))
    inode = image.stat().st_ino
    hold_image(record)
    assert build(catalog, fake_packages()).created_at == older
    assert image.stat().st_ino == inode


def test_damaged_image_in_use_is_not_repaired(catalog, fake_packages, hold_image):
    record = build(catalog, fake_packages(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    (image / "root/etc/one").unlink()
    holder = hold_image(record)
    with pytest.raises(ProfileBusyError, match="damaged"):
        build(catalog, fake_packages(etc__one=b"1"))
    assert image.is_dir()
    holder.kill()
    holder.wait()
    build(catalog, fake_packages(etc__one=b"1"))
    assert (image / "root/etc/one").read_bytes() == b"1"


def test_interrupted_repair_is_completed_by_the_next_build(catalog, fake_packages, monkeypatch):
    record = build(catalog, fake_packages(etc__one=b"1"))
    image = catalog.image_store("tools").rootfs_path(record.digest).parent
    (image / "root/etc/one").unlink()
    rename = Path.rename

    def interrupt(path, target):
        if target == image:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupt)
        patched.setattr(image_store, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
        with pytest.raises(KeyboardInterrupt):
            build(catalog, fake_packages(etc__one=b"1"))
    with pytest.raises(ImageUnusableError, match="build it again"):
        image_of(catalog)
    build(catalog, fake_packages(etc__one=b"1"))
    assert (image / "root/etc/one").read_bytes() == b"1"
    assert sorted(path.name for path in image.parent.iterdir()) == sorted([image.name, "current"])


def test_doctor_reports_the_image_of_each_profile(catalog, fake_packages, tmp_path):
    settings = SimpleNamespace(server=SimpleNamespace(data_dir=tmp_path / "data"))
    record = build(catalog, fake_packages(), name="basic")
    host = "agentic-dev: the host's own /usr; no image is built"
    assert [(finding.ok, finding.message) for finding in check_images(settings)] == [
        (True, host),
        (True, f"basic: image {record.digest}"),
    ]
    (catalog.image_store("basic").rootfs_path(record.digest).parent / "record.json").unlink()
    assert [(finding.ok, finding.remedy) for finding in check_images(settings)] == [
        (True, ""),
        (False, "sandbox profile build basic"),
    ]


def test_concurrent_builds_of_a_profile_are_refused(catalog, fake_packages):
    started, may_continue = threading.Event(), threading.Event()
    install = fake_packages()

    def slow_install(*arguments):
        started.set()
        assert may_continue.wait(30)
        install(*arguments)

    other = threading.Thread(target=build, args=(catalog, slow_install))
    other.start()
    assert started.wait(30)
    with pytest.raises(ProfileBusyError):
        build(catalog, install)
    with pytest.raises(ProfileBusyError):
        catalog.image_store("tools").remove_images()
    may_continue.set()
    other.join(30)
    assert image_of(catalog)


def test_image_is_readable_with_any_umask(catalog, fake_packages):
    before = os.umask(0o077)
    try:
        record = build(catalog, fake_packages())
    finally:
        os.umask(before)
    root = catalog.image_store("tools").rootfs_path(record.digest)
    assert {path.stat().st_mode & 0o777 for path in (root, root / "etc", root / "opt") if path.exists()} == {0o755}
