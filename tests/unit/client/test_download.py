"""A download is a whole and verified file, or none."""

import hashlib
import os
import stat

import pytest

from sandbox.client import ChecksumError
from sandbox.client.download import Download

BYTES = [b"diff --git", b" a b\n"]


def save(chunks, checksum, target):
    with Download(target, checksum) as download:
        for chunk in chunks:
            download.write(chunk)
        return download.finish()


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


def test_the_longest_name_that_a_file_may_have_does(tmp_path):
    target = tmp_path / ("長" * 85)
    assert save(BYTES, SHA256, target) == 15
    assert target.read_bytes() == b"".join(BYTES)


@pytest.fixture
def pipe(tmp_path):
    """A place that is no file, as /dev/null is none, and what was written to it."""
    place = tmp_path / "pipe"
    os.mkfifo(place)
    ends = os.open(place, os.O_RDWR | os.O_NONBLOCK)

    def written():
        try:
            return os.read(ends, 1000)
        except BlockingIOError:
            return b""

    yield place, written
    os.close(ends)


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path, pipe, name):
    place, written = pipe
    (tmp_path / "link").symlink_to(place)
    assert save(BYTES, SHA256, tmp_path / name) == 15
    assert written() == b"".join(BYTES)
    assert stat.S_ISFIFO(place.lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_what_is_no_file_is_not_told_damaged_bytes(tmp_path, pipe):
    place, written = pipe
    with pytest.raises(ChecksumError, match="damaged"):
        save(BYTES, "", place)
    assert written() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
