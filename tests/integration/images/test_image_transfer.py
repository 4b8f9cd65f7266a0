"""Copies of images on other hosts are identified by the digest of their content, never by name."""

import dataclasses
import errno
import fcntl
import hashlib
import io
import os
import shutil
import threading
import tracemalloc
from datetime import date
from types import SimpleNamespace

import msgspec
import pytest

from doubles.image_archives import directory, entry, layer, minimal_root, oci_archive, symlink
from sandbox.images import image_transfer
from sandbox.images.image_builder import build_image, import_image
from sandbox.images.image_store import ImageStore, stream_tar
from sandbox.images.image_transfer import HostImageCopies, ServerImageSource
from sandbox.images.profiles import ImageDefinition, ProfileCatalog
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.images import ImageReceptionBusyError, ImageReference, ImageUnusableError

ODD_NAMES = layer(
    directory("opt"),
    entry("opt/" + "long/" * 40 + "file", b"deep\n"),
    entry("opt/caf\udce9", b"not UTF-8\n"),
    entry("opt/ünïcode", b"", mode=0o755),
    symlink("opt/link", "../etc/passwd"),
)

LARGE = layer(entry("large", b"x" * 600_000))


@dataclasses.dataclass
class ServerAndHost:
    """A server with an image, and a host."""

    source: ServerImageSource
    host: HostImageCopies
    host_data_dir: object

    def reader(self, image):
        """Return a function that returns the parts of the image."""
        return self.source.open(image).read

    def copies(self):
        """Return the names of the directories of the profile on the host."""
        return sorted(path.name for path in (self.host_data_dir / "profiles/tools").iterdir())


@pytest.fixture(scope="module")
def root_layer():
    return minimal_root(is_truncated=True)


@pytest.fixture
def server_and_host(tmp_path):
    return ServerAndHost(ServerImageSource(tmp_path / "server"), HostImageCopies(tmp_path / "host"), tmp_path / "host")


@pytest.fixture
def add(server_and_host, root_layer, tmp_path):
    """Return a function that imports an image with these layers on the server, and returns its reference."""

    def add(*layers, name="tools", tier=""):
        archive = oci_archive(tmp_path / "image.tar", root_layer, *layers)
        import_image(server_and_host.source.image_store(name), archive, tier)
        return server_and_host.source.find_reference(name)

    return add


def test_digest_is_the_hash_of_the_content_that_is_sent(server_and_host, add):
    image = add(ODD_NAMES, LARGE)
    content = server_and_host.source.open(image)
    parts = list(iter(content.read, b""))
    content.close()
    assert image.digest == f"sha256:{hashlib.sha256(b''.join(parts)).hexdigest()}"
    assert {len(part) for part in parts[:-1]} == {256 * 1024}
    root = server_and_host.source.image_store("tools").rootfs_path(image.digest)
    assert b"".join(parts) == b"".join(stream_tar(root))


def test_copy_is_the_same_image(server_and_host, add):
    image = add(ODD_NAMES)
    assert server_and_host.host.find(image, "namespaces") is None
    server_and_host.host.receive(image, server_and_host.reader(image))
    copy = server_and_host.host.find(image, "namespaces")
    assert (copy.profile, copy.digest) == ("tools", image.digest)
    assert os.path.lexists(f"{copy.directory}/opt/link")
    assert (server_and_host.host_data_dir / "profiles/tools/current").read_text().strip() == image.digest[7:]


def test_image_with_the_same_name_and_another_digest_is_not_used(server_and_host, add, root_layer, tmp_path):
    """The host has its own image of the profile. The server's image is added, and does not immediately replace it."""
    archive = oci_archive(tmp_path / "other.tar", root_layer, layer(entry("other", b"other")))
    own = import_image(ProfileCatalog(server_and_host.host_data_dir).image_store("tools"), archive)
    image = add()
    assert server_and_host.host.find(image, "namespaces") is None
    server_and_host.host.receive(image, server_and_host.reader(image))
    assert server_and_host.host.find(image, "namespaces").digest == image.digest != own.digest


def test_own_image_with_the_same_digest_is_used(server_and_host, add, root_layer, tmp_path):
    archive = oci_archive(tmp_path / "same.tar", root_layer)
    import_image(ProfileCatalog(server_and_host.host_data_dir).image_store("tools"), archive)
    image = add()
    assert server_and_host.host.find(image, "namespaces").digest == image.digest


@pytest.mark.parametrize("damage", ["changed", "shortened", "extended", "empty", "not a tar"])
def test_content_with_another_digest_is_refused_and_nothing_is_left(server_and_host, add, damage):
    image = add()
    content = b"".join(iter(server_and_host.reader(image), b""))
    damaged = {
        "changed": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        "shortened": content[:-2048],
        "extended": content + bytes(512),
        "empty": b"",
        "not a tar": b"x" * 10_000,
    }[damage]
    parts = iter([damaged] if damaged else [])
    with pytest.raises(ImageUnusableError, match=rf"The server's image tools@{image.digest} cannot be copied: .*again"):
        server_and_host.host.receive(image, lambda: next(parts, b""))
    assert (server_and_host.host.find(image, "namespaces"), server_and_host.copies()) == (None, [])
    server_and_host.host.receive(image, server_and_host.reader(image))
    assert server_and_host.host.find(image, "namespaces") is not None


def test_content_that_is_larger_than_an_image_may_be_is_refused(server_and_host, add, monkeypatch):
    image = add()
    monkeypatch.setattr("sandbox.images.image_transfer.IMAGE_ENTRIES_MAX", 1)
    with pytest.raises(ImageUnusableError, match="too large"):
        server_and_host.host.receive(msgspec.structs.replace(image, size_bytes=1), server_and_host.reader(image))
    assert server_and_host.copies() == []


def test_interrupted_copy_leaves_nothing(server_and_host, add):
    image, count = add(), 0
    read = server_and_host.reader(image)

    def fail():
        nonlocal count
        count += 1
        if count > 1:
            raise ConnectionResetError
        return read()[:1000]

    with pytest.raises(ConnectionResetError):
        server_and_host.host.receive(image, fail)
    assert (server_and_host.host.find(image, "namespaces"), server_and_host.copies()) == (None, [])


def test_two_workers_of_a_host_do_not_receive_the_same_image_at_once(server_and_host, add):
    image = add()
    read, has_started, may_continue = server_and_host.reader(image), threading.Event(), threading.Event()

    def wait():
        has_started.set()
        assert may_continue.wait(20)
        return read()

    first = threading.Thread(target=server_and_host.host.receive, args=(image, wait))
    first.start()
    assert has_started.wait(20)
    second = HostImageCopies(server_and_host.host_data_dir)
    with pytest.raises(ImageReceptionBusyError):
        second.receive(image, server_and_host.reader(image))
    may_continue.set()
    first.join(20)
    assert second.find(image, "namespaces") is not None


def test_copy_in_use_is_kept_and_an_unused_one_is_removed_with_the_next_copy(server_and_host, add):
    first = add(layer(entry("one", b"1")))
    server_and_host.host.receive(first, server_and_host.reader(first))
    user = HostImageCopies(server_and_host.host_data_dir)
    assert user.find(first, "namespaces") is not None
    for number in (2, 3):
        newer = add(layer(entry("one", b"%d" % number)))
        server_and_host.host.receive(newer, server_and_host.reader(newer))
    assert user.find(first, "namespaces") is not None
    user._unlock(first.digest)
    newest = add(layer(entry("one", b"4")))
    server_and_host.host.receive(newest, server_and_host.reader(newest))
    assert HostImageCopies(server_and_host.host_data_dir).find(first, "namespaces") is None
    assert len(server_and_host.copies()) == 3  # `current`, the newest copy and the one before it


def test_image_is_kept_on_the_server_while_it_is_sent(server_and_host, add):
    image = add(LARGE)
    content = server_and_host.source.open(image)
    assert content.read()
    newer = add(layer(entry("one", b"1")))
    add(layer(entry("one", b"2")))
    assert list(iter(content.read, b""))
    content.close()
    content.close()
    add(layer(entry("one", b"3")))
    assert newer.digest != image.digest
    with pytest.raises(ImageUnusableError):
        server_and_host.source.open(image)


def test_copy_requires_the_tier_of_the_image(server_and_host, add):
    image = add(tier="vm")
    server_and_host.host.receive(image, server_and_host.reader(image))
    with pytest.raises(ImageUnusableError, match="tier vm or stronger; this host's runtime has tier namespaces"):
        server_and_host.host.find(image, "namespaces")
    assert server_and_host.host.find(image, "vm") is not None


def test_host_with_its_own_image_is_refused_if_the_server_has_none(server_and_host, add, root_layer, tmp_path):
    assert server_and_host.source.find_reference("basic") is None
    server_and_host.host.check_no_own_image("basic")
    image = add()
    server_and_host.host.receive(image, server_and_host.reader(image))
    # A copy does not count, because its server may have removed the image.
    server_and_host.host.check_no_own_image("tools")
    archive = oci_archive(tmp_path / "own.tar", root_layer)
    import_image(ProfileCatalog(server_and_host.host_data_dir).image_store("basic"), archive)
    remedy = f"sandbox profile remove basic --data-dir {server_and_host.host_data_dir}"
    with pytest.raises(ImageUnusableError, match=remedy):
        server_and_host.host.check_no_own_image("basic")


def test_profile_name_in_a_reference_is_validated(server_and_host):
    with pytest.raises(Exception, match="profile name"):
        server_and_host.host.find(ImageReference("../x", "sha256:" + "0" * 64, 1), "vm")


@pytest.mark.parametrize("digest", ["sha256:../../outside", "{host}/outside"])
def test_digest_cannot_select_another_directory(server_and_host, add, digest):
    image, digest = add(), digest.format(host=server_and_host.host_data_dir)
    server_and_host.host.receive(image, server_and_host.reader(image))
    copy = server_and_host.host_data_dir / "profiles/tools" / image.digest[7:]
    outside = shutil.copytree(copy, server_and_host.host_data_dir / "outside", symlinks=True)
    record = outside / "record.json"
    record.write_text(record.read_text().replace(image.digest, digest))
    assert server_and_host.host.find(msgspec.structs.replace(image, digest=digest), "vm") is None
    assert server_and_host.host.find(image, "vm") is not None


class TestHostErrors:
    """A host error is not attributed to the image, so the task can run on another host."""

    GIB = 1024**3

    @pytest.fixture
    def free_bytes(self, monkeypatch):
        """Return a function that sets the free space of the host."""

        def free_bytes(size):
            monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=size, f_frsize=1))

        return free_bytes

    def test_image_that_is_too_large_for_the_disk_is_not_received(self, server_and_host, add, free_bytes):
        image, reads = add(LARGE), []
        free_bytes(self.GIB + image.size_bytes - 1)
        with pytest.raises(OSError, match=r"The image needs 0\.0 GiB, and 1\.0 GiB must stay free") as caught:
            server_and_host.host.receive(image, lambda: reads.append(1))
        assert (caught.value.errno, reads, server_and_host.copies()) == (errno.ENOSPC, [], [])

    def test_image_for_which_the_disk_is_just_large_enough_is_received(self, server_and_host, add, free_bytes):
        image = add(LARGE)
        free_bytes(self.GIB + image.size_bytes)
        server_and_host.host.receive(image, server_and_host.reader(image))
        assert server_and_host.host.find(image, "namespaces") is not None

    def test_files_that_the_host_writes_incorrectly_are_a_host_error(self, server_and_host, add, monkeypatch):
        image, compute_digest = add(), image_transfer.compute_digest

        def damage(root):
            (root / "etc/passwd").write_bytes(b"damaged")
            return compute_digest(root)

        monkeypatch.setattr(image_transfer, "compute_digest", damage)
        with pytest.raises(OSError, match="differ from what the server sent") as caught:
            server_and_host.host.receive(image, server_and_host.reader(image))
        assert (caught.value.errno, server_and_host.host.find(image, "namespaces"), server_and_host.copies()) == (
            errno.EIO,
            None,
            [],
        )
        monkeypatch.undo()
        server_and_host.host.receive(image, server_and_host.reader(image))
        assert server_and_host.host.find(image, "namespaces") is not None


def test_only_a_small_part_of_an_image_is_in_memory(server_and_host, add):
    content = server_and_host.source.open(add(layer(entry("large", b"x" * 4_000_000))))
    tracemalloc.start()
    try:
        sizes = {len(content.read()) for _ in range(8)}
        kept_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        content.close()
    assert (sizes, kept_bytes < 600_000) == ({256 * 1024}, True)


def is_locked(copy):
    """Return whether a process protects this copy from removal."""
    descriptor = os.open(os.path.dirname(copy.directory), os.O_RDONLY)  # noqa: PTH120
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_copy_that_replaces_a_deleted_one_is_protected(server_and_host, add):
    image = add()
    server_and_host.host.receive(image, server_and_host.reader(image))
    copy = server_and_host.host.find(image, "namespaces")
    assert is_locked(copy)
    shutil.rmtree(server_and_host.host_data_dir / "profiles")
    HostImageCopies(server_and_host.host_data_dir).receive(image, server_and_host.reader(image))
    assert server_and_host.host.find(image, "namespaces") == copy
    assert is_locked(copy)


def test_copy_stays_protected_if_another_search_finds_it_damaged(server_and_host, add, monkeypatch):
    image, read = add(), ImageStore.read
    server_and_host.host.receive(image, server_and_host.reader(image))
    is_reading, is_found, results = threading.Event(), threading.Event(), []

    def read_damaged(store, digest):
        monkeypatch.setattr(ImageStore, "read", read)
        is_reading.set()
        is_found.wait(0.5)  # a search that does not wait for this one has ended by then
        raise ImageUnusableError("It is damaged.")

    monkeypatch.setattr(ImageStore, "read", read_damaged)
    first = threading.Thread(target=lambda: results.append(server_and_host.host.find(image, "namespaces")))
    first.start()
    assert is_reading.wait(20)
    copy = server_and_host.host.find(image, "namespaces")
    is_found.set()
    first.join(20)
    assert results == [None]
    assert is_locked(copy)


def test_names_that_would_be_whiteouts_in_layers_are_copied(server_and_host, root_layer):
    def install(_, tree, __):
        apply_layer(TarStream(io.BytesIO(root_layer), ByteBudget(2**30)), tree)

    files = {"/opt/.wh.tool": "1", "/opt/tool": "2", "/opt/.wh..wh..opq": "3", "/opt/.wh.d/file": "4"}
    build_image(
        server_and_host.source.image_store("tools"), ImageDefinition("x", date(2026, 1, 1), files=files), {}, install
    )
    image = server_and_host.source.find_reference("tools")
    server_and_host.host.receive(image, server_and_host.reader(image))
    directory = server_and_host.host.find(image, "namespaces").directory
    for path, text in files.items():
        with open(f"{directory}{path}") as file:  # noqa: PTH123
            assert file.read() == text


class TestLayoutVersion:
    """Images whose mount points may differ from those of this version of Sandbox."""

    def change(self, store, digest):
        record = store.rootfs_path(digest).with_name("record.json")
        content = record.read_text()
        record.write_text(content.replace('"layout": 1', '"layout": 99'))
        assert record.read_text() != content

    def test_image_of_the_server_is_refused(self, server_and_host, add):
        image = add()
        self.change(server_and_host.source.image_store("tools"), image.digest)
        with pytest.raises(ImageUnusableError, match="different version of Sandbox; build it again"):
            server_and_host.source.find_reference("tools")

    def test_image_of_the_host_is_replaced_by_that_of_the_server(self, server_and_host, add):
        image = add()
        server_and_host.host.receive(image, server_and_host.reader(image))
        self.change(ImageStore(server_and_host.host_data_dir, "tools"), image.digest)
        assert server_and_host.host.find(image, "namespaces") is None
        server_and_host.host.receive(image, server_and_host.reader(image))
        assert server_and_host.host.find(image, "namespaces") is not None
