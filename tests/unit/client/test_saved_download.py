"""A download is a whole and verified file, or none."""

import hashlib

import pytest

from sandbox.client import ChecksumError
from sandbox.client.download import Download

BYTES = [b"diff --git", b" a b\n"]


def save(chunks, checksum, target):
    with Download(target, checksum) as download:
        for chunk in chunks:
            download.write(chunk)
        return download.keep()


SHA256 = hashlib.sha256(b"".join(BYTES)).hexdigest()


@pytest.mark.parametrize("checksum", [SHA256, f"sha256:{SHA256}", SHA256.upper()])
def test_the_file_appears_with_its_bytes(tmp_path, checksum):
    assert save(BYTES, checksum, tmp_path / "a.patch") == 15
    assert (tmp_path / "a.patch").read_bytes() == b"".join(BYTES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.patch"]


@pytest.mark.parametrize("checksum", ["", "sha256:", hashlib.sha256(b"other").hexdigest()])
def test_bytes_with_another_checksum_or_none_leave_the_old_file_alone(tmp_path, checksum):
    (tmp_path / "a.patch").write_text("old")
    with pytest.raises(ChecksumError, match="damaged"):
        save(BYTES, checksum, tmp_path / "a.patch")
    assert (tmp_path / "a.patch").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.patch"]


def test_a_broken_connection_leaves_nothing(tmp_path):
    def breaking():
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        save(breaking(), SHA256, tmp_path / "a.patch")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.patch").symlink_to(tmp_path / "precious")
    save(BYTES, SHA256, tmp_path / "a.patch")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "a.patch").is_symlink()
