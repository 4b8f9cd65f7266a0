"""The server keeps a copy of the claude binary that can be executed and not read."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox.agents.claude_code.binary import BinaryMissingError, find_binary, install_binary


@pytest.fixture
def source(tmp_path):
    """A stand-in for the wheel's binary."""
    path = tmp_path / "wheel" / "claude"
    path.parent.mkdir()
    path.write_bytes(b"#!/bin/true\n" * 1000)
    path.with_name("claude.version").write_text("9.8.7 (Claude Code)\n")
    return path


def test_the_wheel_has_a_binary():
    assert os.access(find_binary(), os.X_OK)


def test_the_copy_is_execute_only_and_named_after_its_version(tmp_path, source):
    copy = install_binary(tmp_path / "data", source)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o111
    assert copy.name.startswith("claude-9.8.7-")
    assert copy.stat().st_size == source.stat().st_size


def test_the_copy_is_made_once(tmp_path, source):
    first = install_binary(tmp_path, source).stat()
    assert install_binary(tmp_path, source).stat().st_ino == first.st_ino


def test_another_version_is_another_copy_and_the_running_one_stays(tmp_path, source):
    old = install_binary(tmp_path, source)
    source.with_name("claude.version").write_text("9.9.0")
    new = install_binary(tmp_path, source)
    assert new != old
    assert old.exists()


def test_what_a_crash_left_half_written_is_not_used(tmp_path, source):
    directory = tmp_path / "agent"
    directory.mkdir()
    (directory / "partial").write_bytes(b"half")
    assert install_binary(tmp_path, source).stat().st_size == source.stat().st_size
    assert not (directory / "partial").exists()


def test_many_at_once_make_one_whole_copy(tmp_path, source):
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: install_binary(tmp_path, source), range(8)))
    (copy,) = copies
    assert copy.stat().st_size == source.stat().st_size


def test_without_the_wheel_the_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr("sandbox.agents.claude_code.binary._PACKAGE", "no_such_package")
    with pytest.raises(BinaryMissingError, match="install the claude-agent-sdk wheel"):
        find_binary()
