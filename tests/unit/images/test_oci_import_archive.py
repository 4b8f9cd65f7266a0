"""Import of archives from `skopeo` and `docker save`.

Damaged and hostile archives, and archives for other architectures, are rejected.
"""

import json
import lzma
import os
import subprocess
import tarfile

import pytest

from doubles.image_archives import (
    ARCHITECTURE,
    COMPRESSORS,
    digest,
    docker_archive,
    docker_members,
    entry,
    layer,
    oci_archive,
    oci_members,
    save,
    symlink,
    zstd,
)
from sandbox.images import oci_import
from sandbox.images.oci_import import import_layers
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.interfaces.images import ImageRefusedError

BASE = layer(entry("etc/base", b"base"), entry("etc/gone", b"base"))
UPPER_LAYER = layer(entry("etc/above", b"above"), entry("etc/.wh.gone"))


@pytest.fixture
def unpack(tmp_path):
    """Return a function that imports an archive and returns its files with their content."""
    root = tmp_path / "root"
    root.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def unpack(path):
        import_layers(path, RootFsWriter(root), scratch)
        assert list(scratch.iterdir()) == []
        return {path.name: path.read_text() for path in root.rglob("*") if path.is_file()}

    return unpack


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_skopeo_archive_layers_are_applied_in_order(unpack, tmp_path, compression):
    path = oci_archive(tmp_path / "image.tar", BASE, UPPER_LAYER, compression=compression)
    assert unpack(path) == {"base": "base", "above": "above"}


def test_docker_save_archive_layers_are_applied_in_order(unpack, tmp_path):
    assert unpack(docker_archive(tmp_path / "image.tar", BASE, UPPER_LAYER, BASE)) == {
        "base": "base",
        "above": "above",
        "gone": "base",
    }


def test_oci_index_takes_precedence_in_a_docker_save_archive(unpack, tmp_path):
    members = {**docker_members([BASE]), **oci_members([BASE, UPPER_LAYER])}
    assert unpack(save(tmp_path / "image.tar", members)) == {"base": "base", "above": "above"}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("blob", ["layer", "config", "manifest"])
def test_blob_with_wrong_digest_is_rejected(unpack, tmp_path, blob, compression):
    members = oci_members([BASE], compression=compression)
    manifest = json.loads(members["index.json"])["manifests"][0]["digest"]
    manifest_document = json.loads(members[f"blobs/sha256/{manifest[7:]}"])
    expected_digest = {
        "layer": manifest_document["layers"][0]["digest"],
        "config": manifest_document["config"]["digest"],
        "manifest": manifest,
    }[blob]
    name = f"blobs/sha256/{expected_digest[7:]}"
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])
    with pytest.raises(ImageRefusedError, match="digest"):
        unpack(save(tmp_path / "image.tar", members))


def test_layer_that_the_config_does_not_list_is_rejected(unpack, tmp_path):
    members = docker_members([BASE])
    members["layer0/layer.tar"] = UPPER_LAYER
    with pytest.raises(ImageRefusedError, match="digest"):
        unpack(save(tmp_path / "image.tar", members))


@pytest.mark.parametrize("name", ["config.json", "../../etc/passwd", "/etc/passwd"])
def test_config_not_named_by_its_digest_is_rejected(unpack, tmp_path, name):
    members = docker_members([BASE])
    saved = json.loads(members["manifest.json"])
    members[name] = members[saved[0]["Config"]]
    saved[0]["Config"] = name
    members["manifest.json"] = json.dumps(saved).encode()
    with pytest.raises(ImageRefusedError, match="digest"):
        unpack(save(tmp_path / "image.tar", members))


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../../etc/passwd", "layer0"])
def test_layer_path_outside_the_archive_is_not_opened(unpack, tmp_path, name):
    members = docker_members([BASE])
    members["manifest.json"] = members["manifest.json"].replace(b"layer0/layer.tar", name.encode())
    with pytest.raises(ImageRefusedError, match="lacks"):
        unpack(save(tmp_path / "image.tar", members))


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", "../layer0/layer.tar"])
def test_symlink_in_the_archive_is_not_followed_to_the_host(unpack, tmp_path, target):
    members = docker_members([BASE])
    members["layer0/layer.tar"] = target
    with pytest.raises(ImageRefusedError, match="lacks"):
        unpack(save(tmp_path / "image.tar", members))


def test_image_of_another_architecture_is_rejected(unpack, tmp_path):
    with pytest.raises(ImageRefusedError, match="s390x"):
        unpack(oci_archive(tmp_path / "image.tar", BASE, architecture="s390x"))


def test_image_of_this_architecture_is_selected(unpack, tmp_path):
    native = oci_members([BASE], platform={"os": "linux", "architecture": ARCHITECTURE})
    other = oci_members([UPPER_LAYER], architecture="s390x", platform={"os": "linux", "architecture": "s390x"})
    descriptors = [*(json.loads(image_members["index.json"])["manifests"][0] for image_members in (other, native))]
    members = {**other, **native, "index.json": json.dumps({"manifests": descriptors}).encode()}
    assert unpack(save(tmp_path / "image.tar", members)) == {"base": "base", "gone": "base"}


def test_nested_index_is_followed(unpack, tmp_path):
    members = oci_members([BASE])
    inner = members["index.json"]
    kind = "application/vnd.oci.image.index.v1+json"
    members[f"blobs/sha256/{digest(inner)[7:]}"] = inner
    members["index.json"] = json.dumps({"manifests": [{"digest": digest(inner), "mediaType": kind}]}).encode()
    assert unpack(save(tmp_path / "image.tar", members)) == {"base": "base", "gone": "base"}


def test_archive_with_several_images_is_rejected(unpack, tmp_path):
    first, second = oci_members([BASE]), oci_members([UPPER_LAYER])
    descriptors = [*(json.loads(image["index.json"])["manifests"][0] for image in (first, second))]
    members = {**first, **second, "index.json": json.dumps({"manifests": descriptors}).encode()}
    with pytest.raises(ImageRefusedError, match="exactly one"):
        unpack(save(tmp_path / "image.tar", members))


@pytest.mark.parametrize(
    "broken",
    [b"{", b"[]", b'{"manifests": 1}', b'{"manifests": [{"digest": "sha256:../../etc"}]}', b"[" * 100_000, b"\xff"],
)
def test_malformed_index_is_rejected(unpack, tmp_path, broken):
    with pytest.raises(ImageRefusedError):
        unpack(save(tmp_path / "image.tar", {**oci_members([BASE]), "index.json": broken}))


def test_large_index_is_rejected(unpack, tmp_path, monkeypatch):
    monkeypatch.setattr(oci_import, "IMAGE_METADATA_BYTES_MAX", 100)
    with pytest.raises(ImageRefusedError, match="larger than"):
        unpack(save(tmp_path / "image.tar", oci_members([BASE])))


def test_image_with_too_many_layers_is_rejected(unpack, tmp_path, monkeypatch):
    monkeypatch.setattr(oci_import, "IMAGE_LAYERS_MAX", 1)
    assert unpack(oci_archive(tmp_path / "one.tar", BASE))
    with pytest.raises(ImageRefusedError, match="layers"):
        unpack(oci_archive(tmp_path / "two.tar", BASE, UPPER_LAYER))


@pytest.mark.parametrize("compression", ["+gzip", "+zstd"])
def test_decompression_bomb_is_rejected(unpack, tmp_path, monkeypatch, compression):
    monkeypatch.setattr(oci_import, "IMAGE_BYTES_MAX", 1_000_000)
    bomb = layer(entry("zeros", bytes(10_000_000)))
    path = oci_archive(tmp_path / "image.tar", bomb, compression=compression)
    assert path.stat().st_size < 100_000
    with pytest.raises(ImageRefusedError, match="too large"):
        unpack(path)


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_damaged_compressed_data_is_rejected(unpack, tmp_path, magic):
    with pytest.raises(ImageRefusedError):
        unpack(oci_archive(tmp_path / "image.tar", magic + b"no such thing" * 100))


def test_decompressor_that_does_not_exit_is_rejected(unpack, tmp_path, monkeypatch):
    program = tmp_path / "zstd"
    (tmp_path / "plain").write_bytes(BASE)
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/plain\nexec >&-\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(oci_import, "_PROGRAM", str(program))
    monkeypatch.setattr(oci_import, "_EXIT_SECONDS", 0.5)
    with pytest.raises(ImageRefusedError, match="did not finish in time"):
        unpack(oci_archive(tmp_path / "image.tar", BASE, compression="+zstd"))


def test_xz_data_with_a_large_dictionary_in_a_zstd_layer_is_rejected(unpack, tmp_path, monkeypatch):
    """The zstd program also reads xz data, but does not apply its memory limit to that data."""
    xz_filter = {
        "id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 4,
    }  # fmt: skip
    rest = lzma.compress(BASE[512:], format=lzma.FORMAT_XZ, filters=[xz_filter])
    monkeypatch.setitem(COMPRESSORS, "+zstd", lambda data: zstd(data[:512]) + rest)
    with pytest.raises(ImageRefusedError, match=r"damaged|truncated"):
        unpack(oci_archive(tmp_path / "image.tar", BASE, compression="+zstd"))


def test_zstd_layer_with_a_large_window_is_applied(unpack, tmp_path, monkeypatch):
    def compress(data):
        return subprocess.run(["zstd", "-qc", "--long=27"], input=data, capture_output=True, check=True).stdout

    monkeypatch.setitem(COMPRESSORS, "+zstd", compress)
    assert unpack(oci_archive(tmp_path / "image.tar", BASE, compression="+zstd")) == {"base": "base", "gone": "base"}


@pytest.mark.parametrize("kind", ["name", "linkname"])
def test_member_with_a_long_name_is_rejected(unpack, tmp_path, kind):
    """All names are kept in memory, so their length is limited."""
    members = [entry("index.json"), symlink("link", "target")]
    setattr(members[1][0], kind, "a" * 100_000)
    path = tmp_path / "image.tar"
    path.write_bytes(layer(*members))
    with pytest.raises(ImageRefusedError, match="name that is too long"):
        unpack(path)


@pytest.mark.parametrize("content", [b"", b"text", COMPRESSORS["+gzip"](layer(entry("x")))])
def test_file_that_is_not_a_plain_tar_is_rejected(unpack, tmp_path, content):
    path = tmp_path / "image.tar"
    path.write_bytes(content)
    with pytest.raises(ImageRefusedError, match="not an uncompressed tar"):
        unpack(path)


def test_huge_header_is_rejected_without_being_read(unpack, tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, (1 << 33) - 1
    path = tmp_path / "image.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, 1 << 34)
    with pytest.raises(ImageRefusedError, match="header"):
        unpack(path)


def test_self_referencing_member_is_rejected(unpack, tmp_path, monkeypatch):
    """Because the member's size is negative, the next member is the same member again."""
    monkeypatch.setattr(oci_import, "ARCHIVE_MEMBERS_MAX", 10)
    first = bytearray(tarfile.TarInfo("index.json").tobuf())
    back = bytearray(first)
    back[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
    back[148:156] = b"%06o\0 " % (sum(back[:148]) + sum(back[156:]) + 8 * 32)
    path = tmp_path / "image.tar"
    path.write_bytes(first + back + bytes(1024))
    with pytest.raises(ImageRefusedError, match=r"damaged|negative size|malformed"):
        unpack(path)


def test_members_with_the_same_name_are_counted_separately(unpack, tmp_path, monkeypatch):
    monkeypatch.setattr(oci_import, "ARCHIVE_MEMBERS_MAX", 10)
    path = tmp_path / "image.tar"
    path.write_bytes(layer(*[entry("same")] * 11))
    with pytest.raises(ImageRefusedError, match="more than 10 members"):
        unpack(path)


def test_tar_without_an_image_is_rejected(unpack, tmp_path):
    with pytest.raises(ImageRefusedError, match="not an image"):
        unpack(save(tmp_path / "image.tar", {"file": b"content"}))


def test_hostile_layer_in_an_archive_is_rejected(unpack, tmp_path):
    outside = tmp_path / "outside"
    with pytest.raises(ImageRefusedError, match="leads out"):
        unpack(oci_archive(tmp_path / "image.tar", layer(entry("../outside", b"evil"))))
    assert not outside.exists()
    unpack(oci_archive(tmp_path / "image.tar", layer(symlink("up", "../.."), entry("up/outside", b"harmless"))))
    assert not outside.exists()
