"""Secrets from files: only files in the secrets directory are readable."""

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


def resolve_error(directory: Path, key: str) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        read(directory, key)
    assert caught.value.detail.startswith(f"Secret TOKEN (source file, key {key}): ")
    assert "source" not in caught.value.message
    assert str(directory) not in caught.value.message + caught.value.detail
    return caught.value.detail


def test_file_in_the_directory_is_read(directory: Path):
    assert read(directory, "team/token") == "the-value-of-the-token"


@pytest.mark.parametrize(
    ("content", "value"),
    [(b"a\n\n", "a\n"), (b"a", "a"), (b"a\r\n", "a\r"), ("schlüssel\n".encode(), "schlüssel"), (b"x\ny\n", "x\ny")],
)
def test_one_trailing_newline_is_removed(directory: Path, content: bytes, value: str):
    (directory / "file").write_bytes(content)
    assert read(directory, "file") == value


@pytest.mark.parametrize(
    "key", ["/etc/hostname", "../outside", "team/../../outside", "./team/token", "team//token", ".", "team/"]
)
def test_keys_that_are_not_plain_paths_are_refused(directory: Path, key: str):
    assert "relative to the secrets directory" in resolve_error(directory, key)


def test_links_within_the_directory_are_followed(directory: Path, tmp_path: Path):
    # The layout of a mounted Kubernetes secret.
    (directory / "..2026").mkdir()
    (directory / "..2026" / "key").write_text("mounted-value")
    (directory / "..data").symlink_to("..2026")
    (directory / "key").symlink_to("..data/key")
    assert read(directory, "key") == "mounted-value"
    (directory / "out").symlink_to(tmp_path / "outside")
    (directory / "up").symlink_to("..")
    (directory / "twin").symlink_to(tmp_path / "secrets-twin")
    (tmp_path / "secrets-twin").write_text("a file with a similar name")
    for key in ("out", "up/outside", "twin"):
        assert "outside the secrets" in resolve_error(directory, key)


def test_secrets_directory_can_be_a_link(directory: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(directory)
    assert read(tmp_path / "link", "team/token") == "the-value-of-the-token"


@pytest.mark.parametrize("make", [lambda path: None, Path.touch, lambda path: path.symlink_to(path)])
def test_unusable_directory_is_reported_with_its_setting(tmp_path: Path, make):
    make(tmp_path / "wrong")
    error = resolve_error(tmp_path / "wrong", "team/token")
    assert "secrets directory (secrets.directory, SANDBOX_SECRETS_DIRECTORY) cannot be opened" in error


def test_only_regular_files_are_opened(directory: Path):
    os.mkfifo(directory / "fifo")  # opening a FIFO would block forever
    assert "not a regular file" in resolve_error(directory, "fifo")
    assert "not a regular file" in resolve_error(directory, "team")


def test_missing_files_and_link_loops_are_reported(directory: Path):
    assert "there is no such file" in resolve_error(directory, "team/other")
    assert "there is no such file" in resolve_error(directory, "team/token/x")
    (directory / "a").symlink_to("b")
    (directory / "b").symlink_to("a")
    assert "form a loop" in resolve_error(directory, "a")


def test_size_of_a_secret_is_limited(directory: Path):
    (directory / "fits").write_bytes(b"x" * 65536 + b"\n")
    assert len(read(directory, "fits")) == 65536
    (directory / "large").write_bytes(b"x" * 65537)
    assert "larger than 64 KiB" in resolve_error(directory, "large")


def test_content_must_be_utf8(directory: Path):
    (directory / "binary").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in resolve_error(directory, "binary")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_reported(directory: Path):
    (directory / "team" / "token").chmod(0)
    assert "may not read" in resolve_error(directory, "team/token")
