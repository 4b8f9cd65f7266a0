"""A layer of an image is laid inside its tree and nowhere else, whatever its tar says."""

import contextlib
import io
import stat
import tarfile

import pytest

from doubles.image_archives import directory, entry, hardlink, layer, symlink
from sandbox.images import definition, rootfs
from sandbox.images.errors import ImageRefusedError
from sandbox.images.finalize import read_packages
from sandbox.images.oci import tar_stream
from sandbox.images.oci.layer import apply_layer
from sandbox.images.oci.tar_stream import ByteBudget, TarStream
from sandbox.images.rootfs import RootFs


@pytest.fixture
def outside(tmp_path):
    """A directory beside the tree that nothing may touch."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "file").write_text("the host's")
    return place


@pytest.fixture
def planted(tmp_path, outside):
    """A tree, and what lays layers over it."""
    root = tmp_path / "root"
    root.mkdir()
    planted = RootFs(root)
    planted.lay = lambda *layers: [lay(planted, one) for one in layers]
    yield planted
    assert {path.name for path in outside.iterdir()} == {"file"}
    assert (outside / "file").read_text() == "the host's"
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "root"}


def lay(planted, data, bytes_max=1 << 30):
    return apply_layer(TarStream(io.BytesIO(data), ByteBudget(bytes_max)), planted)


def test_files_directories_and_links_are_laid(planted):
    planted.lay(
        layer(
            directory("./"),
            directory("./usr/bin/"),
            entry("./usr/bin/tool", b"#!/bin/sh\n", mode=0o700),
            entry("usr/share/doc", b"text", mode=0o600, mtime=1_600_000_000),
            symlink("bin", "usr/bin"),
            hardlink("usr/bin/other", "usr/bin/tool"),
        )
    )
    tool, doc = planted.root / "usr/bin/tool", planted.root / "usr/share/doc"
    assert tool.read_bytes() == b"#!/bin/sh\n"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tool, doc, doc.parent)] == [0o755, 0o644, 0o755]
    assert doc.stat().st_mtime == 1_600_000_000
    assert (planted.root / "bin").readlink().as_posix() == "usr/bin"
    assert (planted.root / "usr/bin/other").samefile(tool)


@pytest.mark.parametrize(
    "name", ["../outside/new", "usr/../../outside/new", "a/../../outside/new", "..", "usr/..", "/../outside/new"]
)
def test_a_path_that_leads_out_is_refused(planted, name):
    with pytest.raises(ImageRefusedError, match="leads out"):
        planted.lay(layer(entry(name, b"evil")))


def test_a_path_with_a_leading_slash_is_one_of_the_tree(planted, outside):
    planted.lay(layer(entry(f"/{outside}/new", b"harmless")))
    assert (planted.root / str(outside)[1:] / "new").read_bytes() == b"harmless"


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_link_to_the_host_leads_into_the_tree(planted, outside, kind):
    target = str(outside) if kind == "absolute" else "../outside"
    planted.lay(layer(symlink("door", target)), layer(entry("door/new", b"inside")))
    place = str(outside)[1:] if kind == "absolute" else "outside"
    assert (planted.root / place / "new").read_bytes() == b"inside"


def test_a_link_within_the_tree_is_followed_to_its_directory(planted):
    planted.lay(layer(directory("usr/lib"), symlink("lib", "usr/lib")), layer(entry("lib/tool.so", b"library")))
    assert (planted.root / "usr/lib/tool.so").read_bytes() == b"library"
    assert (planted.root / "lib").is_symlink()


def test_a_file_over_a_link_replaces_the_link_and_not_what_it_leads_to(planted, outside):
    planted.lay(layer(symlink("file", str(outside / "file"))), layer(entry("file", b"new")))
    assert (planted.root / "file").read_bytes() == b"new"
    assert not (planted.root / "file").is_symlink()


@pytest.mark.parametrize(
    "entries",
    [
        [symlink("a", "b"), symlink("b", "a"), entry("a/x", b"")],
        [entry("file", b""), entry("file/x", b"")],
        [symlink("a", "/../../outside/file"), entry("a/x", b"")],
    ],
    ids=["links in a circle", "a file as a directory", "a link past the root"],
)
def test_a_way_that_is_none_is_refused_or_stays_inside(planted, entries):
    try:
        planted.lay(layer(*entries))
    except ImageRefusedError:
        return
    assert (planted.root / "outside/file/x").read_bytes() == b""


@pytest.mark.parametrize("target", ["../outside/file", "{outside}/file", "missing", "door/file", "self", "directory"])
def test_a_hard_link_to_what_is_no_file_of_the_tree_is_refused(planted, outside, target):
    entries = [symlink("door", str(outside)), directory("directory")]
    with pytest.raises(ImageRefusedError):
        planted.lay(layer(*entries, hardlink("self", target.format(outside=outside))))
    assert (outside / "file").stat().st_nlink == 1


def test_a_hard_link_across_layers_is_laid(planted):
    planted.lay(layer(entry("etc/conf", b"text")), layer(hardlink("etc/same", "/etc/conf")))
    assert (planted.root / "etc/same").read_bytes() == b"text"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_left_out(planted, kind):
    planted.lay(layer(entry("dev/sda", kind=kind), entry("dev/plain", b"file")))
    assert [path.name for path in (planted.root / "dev").iterdir()] == ["plain"]


def test_an_entry_of_an_unknown_kind_is_refused(planted):
    with pytest.raises(ImageRefusedError, match="unknown type"):
        planted.lay(layer(entry("odd", kind=b"Z")))


def test_setuid_setgid_and_sticky_bits_and_rights_to_write_are_taken_away(planted):
    planted.lay(layer(entry("su", b"program", mode=0o6777), directory("place"), entry("data", b"", mode=0o1666)))
    modes = [stat.S_IMODE((planted.root / name).stat().st_mode) for name in ("su", "data")]
    assert modes == [0o755, 0o644]


def test_a_whiteout_takes_away_what_earlier_layers_have(planted):
    planted.lay(
        layer(entry("etc/a", b"1"), entry("etc/b", b"1"), entry("opt/old/x", b"1"), entry("opt/kept", b"1")),
        layer(entry("etc/.wh.a"), entry("opt/old/new", b"2"), entry("opt/old/.wh..wh..opq")),
    )
    found = {path.relative_to(planted.root).as_posix() for path in planted.root.rglob("*") if path.is_file()}
    assert found == {"etc/b", "opt/old/new", "opt/kept"}


def test_a_whiteout_leaves_what_its_own_layer_brings(planted):
    planted.lay(layer(entry("etc/a", b"old")), layer(entry("etc/a", b"new"), entry("etc/.wh.a")))
    assert (planted.root / "etc/a").read_bytes() == b"new"


@pytest.mark.parametrize("name", [".wh...", ".wh.", "door/.wh.file", "../outside/.wh.file"])
def test_a_whiteout_takes_nothing_away_outside(planted, outside, name):
    entries = [symlink("door", str(outside)), entry("kept", b"")]
    planted.lay(layer(*entries))
    with contextlib.suppress(ImageRefusedError):
        planted.lay(layer(entry(name)))
    assert (planted.root / "kept").exists()


def test_an_image_that_is_too_large_is_refused_before_it_is_written(planted, monkeypatch):
    monkeypatch.setattr(rootfs, "IMAGE_BYTES_MAX", 1000)
    planted.lay(layer(entry("fits", bytes(1000))))
    with pytest.raises(ImageRefusedError, match="larger"):
        planted.lay(layer(entry("more", b"1")))
    assert not (planted.root / "more").exists()


def test_an_image_of_too_many_files_is_refused(planted, monkeypatch):
    monkeypatch.setattr(rootfs, "IMAGE_ENTRIES_MAX", 3)
    planted.lay(layer(*(entry(f"file{index}") for index in range(3))))
    with pytest.raises(ImageRefusedError, match="files"):
        planted.lay(layer(entry("one-more")))


def test_directories_on_the_way_to_an_entry_count_as_well(planted, monkeypatch):
    monkeypatch.setattr(rootfs, "IMAGE_ENTRIES_MAX", 3)
    with pytest.raises(ImageRefusedError, match="files"):
        planted.lay(layer(entry("a/b/c/d/e")))
    assert len(list(planted.root.rglob("*"))) <= 3


def test_a_directory_on_the_way_to_many_entries_counts_once(planted, monkeypatch):
    monkeypatch.setattr(rootfs, "IMAGE_ENTRIES_MAX", 5)
    planted.lay(layer(*(entry(f"a/b/{name}") for name in ("one", "two", "three"))))


def test_an_image_that_is_too_large_by_the_names_of_one_file_is_refused(planted, monkeypatch):
    """All of it is read by name, for its digest."""
    monkeypatch.setattr(rootfs, "IMAGE_BYTES_MAX", 1000)
    planted.lay(layer(entry("file", bytes(400)), hardlink("same", "file")))
    with pytest.raises(ImageRefusedError, match="larger"):
        planted.lay(layer(hardlink("once-more", "file")))


@pytest.mark.parametrize("whiteout", [".wh.nothing", "place/.wh..wh..opq"])
def test_an_image_of_too_many_whiteouts_is_refused(planted, monkeypatch, whiteout):
    monkeypatch.setattr(rootfs, "IMAGE_ENTRIES_MAX", 4)
    planted.lay(layer(directory("place"), *[entry(whiteout)] * 3))
    with pytest.raises(ImageRefusedError, match="files"):
        planted.lay(layer(entry(whiteout)))


def test_a_directory_is_not_looked_through_for_whiteouts_again_and_again(planted, monkeypatch):
    monkeypatch.setattr(rootfs, "IMAGE_ENTRIES_MAX", 20)
    files, whiteout = [entry(f"place/{number}", b"new") for number in range(8)], entry("place/.wh..wh..opq")
    planted.lay(layer(*files, whiteout, whiteout))
    assert len(list((planted.root / "place").iterdir())) == 8
    with pytest.raises(ImageRefusedError, match="whiteouts"):
        planted.lay(layer(*files, whiteout))


def test_a_layer_that_unpacks_to_more_than_its_bound_is_refused(planted):
    data = layer(entry("zeros", bytes(100_000)))
    with pytest.raises(ImageRefusedError, match="uncompressed"):
        lay(planted, data, bytes_max=50_000)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "x", "x" * (definition.IMAGE_PATH_BYTES_MAX + 1)])
def test_a_path_that_no_file_system_takes_is_refused(planted, name):
    with pytest.raises(ImageRefusedError):
        planted.lay(layer(entry(name, b"")))


def test_a_header_of_many_megabytes_is_refused_without_being_read(planted):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with pytest.raises(ImageRefusedError):
        planted.lay(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))


def test_a_tree_that_is_too_deep_to_be_removed_again_is_refused(planted):
    deep = "/".join("a" * 100)
    planted.lay(layer(directory(deep), symlink("door", deep)))
    for entries in ([directory("/".join("b" * 200))], [directory(f"door/{deep}")], [entry(f"door/{deep}/file")]):
        with pytest.raises(ImageRefusedError, match="128 levels deep"):
            planted.lay(layer(*entries))


def sparse(numbers):
    """A file whose holes are told in a map of so many numbers."""
    content = b"%d\n" % (numbers // 2) + b"0\n" * numbers
    content += bytes(-len(content) % 512)
    made = entry("file", content)
    words = {"major": "1", "minor": "0", "name": "file", "realsize": "0"}
    made[0].pax_headers = {f"GNU.sparse.{name}": value for name, value in words.items()}
    return made


def test_a_map_of_holes_without_end_is_refused(planted, monkeypatch):
    monkeypatch.setattr(tar_stream, "IMAGE_METADATA_BYTES_MAX", 1 << 20)
    planted.lay(layer(entry("large", bytes(1 << 21)), sparse(100_000), sparse(100_000)))
    with pytest.raises(ImageRefusedError, match="header"):
        planted.lay(layer(sparse(1_000_000)))


def test_global_headers_do_not_add_up(planted):
    def saying(count, size):
        words = (tarfile.TarInfo.create_pax_global_header({f"word{n}": "x" * size}) for n in range(count))
        return b"".join(one + layer(entry("file"))[:512] for one in words) + bytes(1024)

    planted.lay(saying(10, 1000))
    for count, size in ((5, 1 << 20), (200, 10)):
        with pytest.raises(ImageRefusedError, match="global headers"):
            planted.lay(saying(count, size))


def test_packages_are_read_from_a_list_that_makes_no_sense_as_fast(planted):
    status = "Package: git\nStatus: install ok installed\nDescription: x\n Version: 0\nVersion: 1:2.3\n\n"
    status += "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nStatus: install ok installed\n"
    planted.lay(layer(entry("var/lib/dpkg/status", (status + "Package: a\n" * 200_000).encode())))
    assert read_packages(planted) == {"git": "1:2.3"}


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, layer(entry("cut", bytes(5000)))[:3000]])
def test_what_is_no_whole_tar_is_refused(planted, data):
    with pytest.raises(ImageRefusedError):
        planted.lay(data)
