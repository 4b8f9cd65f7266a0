"""A download produces either a complete, verified file or no file."""

import hashlib
import os
import stat

import pytest

from sandbox.client import ChecksumError
from sandbox.client.verified_download import Download

BYTES = [b"diff --git", b" a b\n"]


def save(chunks, checksum, target):
    with Download(target, checksum) as download:
        for chunk in chunks:
            download.write(chunk)
        return download.finish()


SHA256 = hashlib.sha256(b"".join(BYTES)).hexdigest()


@pytest.mark.parametrize("checksum", [SHA256, f"sha256:{SHA256}", SHA256.upper()])
def test_download_writes_the_file(tmp_path, checksum):
    assert save(BYTES, checksum, tmp_path / "a.patch") == 15
    assert (tmp_path / "a.patch").read_bytes() == b"".join(BYTES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.patch"]


@pytest.mark.parametrize("checksum", ["", "sha256:", hashlib.sha256(b"other").hexdigest()])
def test_checksum_mismatch_leaves_the_old_file_unchanged(tmp_path, checksum):
    (tmp_path / "a.patch").write_text("old")
    with pytest.raises(ChecksumError, match="damaged"):
        save(BYTES, checksum, tmp_path / "a.patch")
    assert (tmp_path / "a.patch").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.patch"]


def test_broken_connection_leaves_no_file(tmp_path):
    def failing_chunks():
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        save(failing_chunks(), SHA256, tmp_path / "a.patch")
    assert list(tmp_path.iterdir()) == []


def test_symlink_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.patch").symlink_to(tmp_path / "precious")
    save(BYTES, SHA256, tmp_path / "a.patch")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "a.patch").is_symlink()


def test_file_name_of_the_maximum_length_is_saved(tmp_path):
    target = tmp_path / ("長" * 85)
    assert save(BYTES, SHA256, target) == 15
    assert target.read_bytes() == b"".join(BYTES)


@pytest.fixture
def pipe(tmp_path):
    """A path that is not a regular file (like /dev/null), and a reader of the data written to it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read_written():
        try:
            return os.read(descriptor, 1000)
        except BlockingIOError:
            return b""

    yield path, read_written
    os.close(descriptor)


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_data_is_written_to_a_special_file_without_replacing_the_file(tmp_path, pipe, name):
    path, read_written = pipe
    (tmp_path / "link").symlink_to(path)
    assert save(BYTES, SHA256, tmp_path / name) == 15
    assert read_written() == b"".join(BYTES)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_special_file_receives_no_damaged_bytes(tmp_path, pipe):
    path, read_written = pipe
    with pytest.raises(ChecksumError, match="damaged"):
        save(BYTES, "", path)
    assert read_written() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
