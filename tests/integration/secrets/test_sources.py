"""Secrets from files: what lies below the secrets directory, and nothing else."""

import asyncio
import os
from pathlib import Path

import pytest

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.sources import FileSource


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    (directory / "team").mkdir(parents=True)
    (directory / "team" / "token").write_text("the-value-of-the-token\n")
    (tmp_path / "outside").write_text("not-to-be-seen\n")
    return directory


def read(directory: Path, key: str) -> str:
    return asyncio.run(FileSource(directory).resolve(Secret(name="TOKEN", source="file", key=key)))


def refusal(directory: Path, key: str) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        read(directory, key)
    assert caught.value.detail.startswith(f"Secret TOKEN (source file, key {key}): ")
    assert "source" not in caught.value.message
    assert str(directory) not in caught.value.message + caught.value.detail
    return caught.value.detail


def test_a_file_below_the_directory(directory: Path):
    assert read(directory, "team/token") == "the-value-of-the-token"


@pytest.mark.parametrize(
    ("content", "value"),
    [(b"a\n\n", "a\n"), (b"a", "a"), (b"a\r\n", "a\r"), ("schlüssel\n".encode(), "schlüssel"), (b"x\ny\n", "x\ny")],
)
def test_one_newline_at_the_end_is_left_out(directory: Path, content: bytes, value: str):
    (directory / "file").write_bytes(content)
    assert read(directory, "file") == value


@pytest.mark.parametrize(
    "key", ["/etc/hostname", "../outside", "team/../../outside", "./team/token", "team//token", ".", "team/"]
)
def test_keys_that_are_no_plain_path(directory: Path, key: str):
    assert "relative to the secrets directory" in refusal(directory, key)


def test_a_link_may_lead_within_the_directory_and_not_out_of_it(directory: Path, tmp_path: Path):
    # A mounted Kubernetes secret looks like this.
    (directory / "..2026").mkdir()
    (directory / "..2026" / "key").write_text("mounted-value")
    (directory / "..data").symlink_to("..2026")
    (directory / "key").symlink_to("..data/key")
    assert read(directory, "key") == "mounted-value"
    (directory / "out").symlink_to(tmp_path / "outside")
    (directory / "up").symlink_to("..")
    (directory / "twin").symlink_to(tmp_path / "secrets-twin")
    (tmp_path / "secrets-twin").write_text("a neighbour with a similar name")
    for key in ("out", "up/outside", "twin"):
        assert "leads out" in refusal(directory, key)


def test_the_directory_itself_may_be_a_link(directory: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(directory)
    assert read(tmp_path / "link", "team/token") == "the-value-of-the-token"


@pytest.mark.parametrize("make", [lambda place: None, Path.touch, lambda place: place.symlink_to(place)])
def test_a_directory_that_cannot_be_opened_is_told_with_its_setting(tmp_path: Path, make):
    make(tmp_path / "wrong")
    told = refusal(tmp_path / "wrong", "team/token")
    assert "secrets directory (secrets.directory, SANDBOX_SECRETS_DIRECTORY) cannot be opened" in told


def test_only_regular_files_are_opened(directory: Path):
    os.mkfifo(directory / "fifo")  # opening it would wait for ever
    assert "not a regular file" in refusal(directory, "fifo")
    assert "not a regular file" in refusal(directory, "team")


def test_what_is_not_there(directory: Path):
    assert "there is no such file" in refusal(directory, "team/other")
    assert "there is no such file" in refusal(directory, "team/token/x")
    (directory / "a").symlink_to("b")
    (directory / "b").symlink_to("a")
    assert "in a circle" in refusal(directory, "a")


def test_the_size_has_a_bound(directory: Path):
    (directory / "fits").write_bytes(b"x" * 65536 + b"\n")
    assert len(read(directory, "fits")) == 65536
    (directory / "large").write_bytes(b"x" * 65537)
    assert "larger than 64 KiB" in refusal(directory, "large")


def test_only_text(directory: Path):
    (directory / "binary").write_bytes(b"\xff\xfe")
    assert "no UTF-8 text" in refusal(directory, "binary")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_somebody_else(directory: Path):
    (directory / "team" / "token").chmod(0)
    assert "may not read" in refusal(directory, "team/token")
