"""Layers are applied only inside their tree."""

import contextlib
import errno
import io
import os
import stat
import tarfile
import tracemalloc

import pytest

from doubles.image_archives import directory, entry, hardlink, layer, symlink
from sandbox.images import limits, rootfs_writer, tar_layers
from sandbox.images.image_builder import read_packages
from sandbox.images.image_store import compute_digest
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.images import ImageRefusedError


@pytest.fixture
def outside(tmp_path):
    """A directory next to the tree. It must not change."""
    directory_path = tmp_path / "outside"
    directory_path.mkdir()
    (directory_path / "file").write_text("the host's")
    return directory_path


@pytest.fixture
def tree(tmp_path, outside):
    """A RootFsWriter with an `apply` method for layers. After the test, nothing outside the tree may have changed."""
    root = tmp_path / "root"
    root.mkdir()
    tree = RootFsWriter(root)
    tree.apply = lambda *layers: [apply(tree, data) for data in layers]
    yield tree
    assert {path.name for path in outside.iterdir()} == {"file"}
    assert (outside / "file").read_text() == "the host's"
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "root"}


def apply(tree, data, bytes_max=1 << 30):
    return apply_layer(TarStream(io.BytesIO(data), ByteBudget(bytes_max)), tree)


def test_files_and_directories_and_links_are_applied(tree):
    tree.apply(
        layer(
            directory("./"),
            directory("./usr/bin/"),
            entry("./usr/bin/tool", b"#!/bin/sh\n", mode=0o700),
            entry("usr/share/doc", b"text", mode=0o600, mtime=1_600_000_000),
            symlink("bin", "usr/bin"),
            hardlink("usr/bin/other", "usr/bin/tool"),
        )
    )
    tool, doc = tree.root / "usr/bin/tool", tree.root / "usr/share/doc"
    assert tool.read_bytes() == b"#!/bin/sh\n"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tool, doc, doc.parent)] == [0o755, 0o644, 0o755]
    assert doc.stat().st_mtime == 1_600_000_000
    assert (tree.root / "bin").readlink().as_posix() == "usr/bin"
    assert (tree.root / "usr/bin/other").samefile(tool)


@pytest.mark.parametrize(
    "name", ["../outside/new", "usr/../../outside/new", "a/../../outside/new", "..", "usr/..", "/../outside/new"]
)
def test_path_outside_the_tree_is_rejected(tree, name):
    with pytest.raises(ImageRefusedError, match="leads out"):
        tree.apply(layer(entry(name, b"evil")))


def test_absolute_path_is_resolved_inside_the_tree(tree, outside):
    tree.apply(layer(entry(f"/{outside}/new", b"harmless")))
    assert (tree.root / str(outside)[1:] / "new").read_bytes() == b"harmless"


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_symlink_to_the_host_resolves_inside_the_tree(tree, outside, kind):
    target = str(outside) if kind == "absolute" else "../outside"
    tree.apply(layer(symlink("door", target)), layer(entry("door/new", b"inside")))
    place = str(outside)[1:] if kind == "absolute" else "outside"
    assert (tree.root / place / "new").read_bytes() == b"inside"


def test_symlink_within_the_tree_is_followed(tree):
    tree.apply(layer(directory("usr/lib"), symlink("lib", "usr/lib")), layer(entry("lib/tool.so", b"library")))
    assert (tree.root / "usr/lib/tool.so").read_bytes() == b"library"
    assert (tree.root / "lib").is_symlink()


def test_file_replaces_a_symlink_but_not_its_target(tree, outside):
    tree.apply(layer(symlink("file", str(outside / "file"))), layer(entry("file", b"new")))
    assert (tree.root / "file").read_bytes() == b"new"
    assert not (tree.root / "file").is_symlink()


@pytest.mark.parametrize(
    "entries",
    [
        [symlink("a", "b"), symlink("b", "a"), entry("a/x", b"")],
        [entry("file", b""), entry("file/x", b"")],
        [symlink("a", "/../../outside/file"), entry("a/x", b"")],
    ],
    ids=["symlink loop", "file as directory", "symlink past the root"],
)
def test_unresolvable_path_is_rejected_or_resolved_inside_the_tree(tree, entries):
    try:
        tree.apply(layer(*entries))
    except ImageRefusedError:
        return
    assert (tree.root / "outside/file/x").read_bytes() == b""


@pytest.mark.parametrize("target", ["../outside/file", "{outside}/file", "missing", "door/file", "self", "directory"])
def test_hard_link_target_must_be_a_file_in_the_tree(tree, outside, target):
    entries = [symlink("door", str(outside)), directory("directory")]
    with pytest.raises(ImageRefusedError):
        tree.apply(layer(*entries, hardlink("self", target.format(outside=outside))))
    assert (outside / "file").stat().st_nlink == 1


def test_hard_link_across_layers_is_applied(tree):
    tree.apply(layer(entry("etc/conf", b"text")), layer(hardlink("etc/same", "/etc/conf")))
    assert (tree.root / "etc/same").read_bytes() == b"text"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_skipped(tree, kind):
    tree.apply(layer(entry("dev/sda", kind=kind), entry("dev/plain", b"file")))
    assert [path.name for path in (tree.root / "dev").iterdir()] == ["plain"]


def test_unknown_entry_type_is_rejected(tree):
    with pytest.raises(ImageRefusedError, match="unknown type"):
        tree.apply(layer(entry("odd", kind=b"Z")))


def test_special_and_write_mode_bits_are_removed(tree):
    tree.apply(layer(entry("su", b"program", mode=0o6777), directory("place"), entry("data", b"", mode=0o1666)))
    modes = [stat.S_IMODE((tree.root / name).stat().st_mode) for name in ("su", "data")]
    assert modes == [0o755, 0o644]


def test_whiteout_removes_files_of_earlier_layers(tree):
    tree.apply(
        layer(entry("etc/a", b"1"), entry("etc/b", b"1"), entry("opt/old/x", b"1"), entry("opt/kept", b"1")),
        layer(entry("etc/.wh.a"), entry("opt/old/new", b"2"), entry("opt/old/.wh..wh..opq")),
    )
    files = {path.relative_to(tree.root).as_posix() for path in tree.root.rglob("*") if path.is_file()}
    assert files == {"etc/b", "opt/old/new", "opt/kept"}


def test_whiteout_does_not_remove_files_of_its_own_layer(tree):
    tree.apply(layer(entry("etc/a", b"old")), layer(entry("etc/a", b"new"), entry("etc/.wh.a")))
    assert (tree.root / "etc/a").read_bytes() == b"new"


@pytest.mark.parametrize("name", [".wh...", ".wh.", "door/.wh.file", "../outside/.wh.file"])
def test_whiteout_removes_nothing_outside_the_tree(tree, outside, name):
    entries = [symlink("door", str(outside)), entry("kept", b"")]
    tree.apply(layer(*entries))
    with contextlib.suppress(ImageRefusedError):
        tree.apply(layer(entry(name)))
    assert (tree.root / "kept").exists()


def test_image_that_is_too_large_is_rejected_before_it_is_written(tree, monkeypatch):
    monkeypatch.setattr(rootfs_writer, "IMAGE_BYTES_MAX", 1000)
    tree.apply(layer(entry("fits", bytes(1000))))
    with pytest.raises(ImageRefusedError, match="larger"):
        tree.apply(layer(entry("more", b"1")))
    assert not (tree.root / "more").exists()


def test_image_with_too_many_files_is_rejected(tree, monkeypatch):
    monkeypatch.setattr(rootfs_writer, "IMAGE_ENTRIES_MAX", 3)
    tree.apply(layer(*(entry(f"file{index}") for index in range(3))))
    with pytest.raises(ImageRefusedError, match="files"):
        tree.apply(layer(entry("one-more")))


def test_parent_directories_count_as_entries(tree, monkeypatch):
    monkeypatch.setattr(rootfs_writer, "IMAGE_ENTRIES_MAX", 3)
    with pytest.raises(ImageRefusedError, match="files"):
        tree.apply(layer(entry("a/b/c/d/e")))
    assert len(list(tree.root.rglob("*"))) <= 3


def test_shared_parent_directory_counts_once(tree, monkeypatch):
    monkeypatch.setattr(rootfs_writer, "IMAGE_ENTRIES_MAX", 5)
    tree.apply(layer(*(entry(f"a/b/{name}") for name in ("one", "two", "three"))))


def test_long_paths_are_not_kept_in_memory(tree):
    """An image may have a million entries with paths of 3500 bytes each."""
    parent = "/".join(["d" * 250] * 10)
    data = layer(*(symlink(f"{parent}/{number}", "target") for number in range(1000)))
    tracemalloc.start()
    try:
        tree.apply(data)
        kept_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        digest = compute_digest(tree.root)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.entry_count == 1011
    assert max(kept_bytes, peak_bytes - kept_bytes) < 1_000_000


def test_hard_links_count_toward_the_image_size(tree, monkeypatch):
    """Each name counts as the full file size, because the digest reads the file once per name."""
    monkeypatch.setattr(rootfs_writer, "IMAGE_BYTES_MAX", 1000)
    tree.apply(layer(entry("file", bytes(400)), hardlink("same", "file")))
    with pytest.raises(ImageRefusedError, match="larger"):
        tree.apply(layer(hardlink("once-more", "file")))


@pytest.mark.parametrize("whiteout", [".wh.nothing", "place/.wh..wh..opq"])
def test_image_with_too_many_whiteouts_is_rejected(tree, monkeypatch, whiteout):
    monkeypatch.setattr(rootfs_writer, "IMAGE_ENTRIES_MAX", 4)
    tree.apply(layer(directory("place"), *[entry(whiteout)] * 3))
    with pytest.raises(ImageRefusedError, match="files"):
        tree.apply(layer(entry(whiteout)))


def test_whiteout_scans_of_a_directory_are_bounded(tree, monkeypatch):
    monkeypatch.setattr(rootfs_writer, "IMAGE_ENTRIES_MAX", 20)
    entries, whiteout = [entry(f"place/{number}", b"new") for number in range(8)], entry("place/.wh..wh..opq")
    tree.apply(layer(*entries, whiteout, whiteout))
    assert len(list((tree.root / "place").iterdir())) == 8
    with pytest.raises(ImageRefusedError, match="whiteouts"):
        tree.apply(layer(*entries, whiteout))


def test_layer_over_its_unpacked_limit_is_rejected(tree):
    data = layer(entry("zeros", bytes(100_000)))
    with pytest.raises(ImageRefusedError, match="uncompressed"):
        apply(tree, data, bytes_max=50_000)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x", "x" * (limits.IMAGE_PATH_BYTES_MAX + 1)])
def test_path_that_is_too_long_is_rejected(tree, name):
    with pytest.raises(ImageRefusedError):
        tree.apply(layer(entry(name, b"")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_error_of_the_disk_is_not_an_error_of_the_image(tree, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rootfs_writer, "_make_directory", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        tree.apply(layer(entry("parent/file", b"")))


def test_huge_header_is_rejected_without_being_read(tree):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with pytest.raises(ImageRefusedError):
        tree.apply(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))


def test_tree_that_is_too_deep_is_rejected(tree):
    deep = "/".join("a" * 100)
    tree.apply(layer(directory(deep), symlink("door", deep)))
    for entries in ([directory("/".join("b" * 200))], [directory(f"door/{deep}")], [entry(f"door/{deep}/file")]):
        with pytest.raises(ImageRefusedError, match="128 levels deep"):
            tree.apply(layer(*entries))


def sparse(numbers):
    """Build a sparse file whose map has this many numbers."""
    content = b"%d\n" % (numbers // 2) + b"0\n" * numbers
    content += bytes(-len(content) % 512)
    tar_entry = entry("file", content)
    headers = {"major": "1", "minor": "0", "name": "file", "realsize": "0"}
    tar_entry[0].pax_headers = {f"GNU.sparse.{name}": value for name, value in headers.items()}
    return tar_entry


def test_sparse_map_that_is_too_large_is_rejected(tree, monkeypatch):
    monkeypatch.setattr(tar_layers, "IMAGE_METADATA_BYTES_MAX", 1 << 20)
    tree.apply(layer(entry("large", bytes(1 << 21)), sparse(100_000), sparse(100_000)))
    with pytest.raises(ImageRefusedError, match="header"):
        tree.apply(layer(sparse(1_000_000)))


def test_global_headers_are_bounded(tree):
    def global_headers(count, size):
        headers = (tarfile.TarInfo.create_pax_global_header({f"word{n}": "x" * size}) for n in range(count))
        return b"".join(header + layer(entry("file"))[:512] for header in headers) + bytes(1024)

    tree.apply(global_headers(10, 1000))
    for count, size in ((5, 1 << 20), (200, 10)):
        with pytest.raises(ImageRefusedError, match="global headers"):
            tree.apply(global_headers(count, size))


def test_malformed_package_list_is_parsed_in_linear_time(tree):
    status = "Package: git\nStatus: install ok installed\nDescription: x\n Version: 0\nVersion: 1:2.3\n\n"
    status += "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nStatus: install ok installed\n"
    tree.apply(layer(entry("var/lib/dpkg/status", (status + "Package: a\n" * 200_000).encode())))
    assert read_packages(tree) == {"git": "1:2.3"}


def package_list(packages):
    paragraphs = (
        f"Package: {name}\nStatus: install ok installed\nVersion: {version}\n\n" for name, version in packages
    )
    return layer(entry("var/lib/dpkg/status", "".join(paragraphs).encode()))


def test_long_package_list_is_refused(tree):
    packages = {f"package-{number}": f"1:{number}.0~rc1-2+b1" for number in range(50_000)}
    tree.apply(package_list(packages.items()))
    assert read_packages(tree) == packages
    tree.apply(package_list((f"package-{number}", "1" * 30) for number in range(60_000)))
    with pytest.raises(ImageRefusedError, match="packages exceed"):
        read_packages(tree)


def test_invalid_packages_are_left_out_of_the_list(tree):
    tree.apply(package_list([("a", "\x01"), ("\x1b[2J", "1"), ("b" * 10, "1 2"), ("git", "1:2.3"), ("", "1")]))
    assert read_packages(tree) == {"git": "1:2.3"}


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, layer(entry("cut", bytes(5000)))[:3000]])
def test_incomplete_tar_is_rejected(tree, data):
    with pytest.raises(ImageRefusedError):
        tree.apply(data)
