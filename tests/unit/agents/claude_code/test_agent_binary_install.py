"""The server's copy of the claude binary, which is executable but not readable."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox.agents.claude_code.agent import BinaryMissingError, find_binary, install_binary


@pytest.fixture
def source(tmp_path):
    """A fake binary with its version file, as in the wheel."""
    path = tmp_path / "wheel" / "claude"
    path.parent.mkdir()
    path.write_bytes(b"#!/bin/true\n" * 1000)
    path.with_name("claude.version").write_text("9.8.7 (Claude Code)\n")
    return path


def test_found_binary_is_executable():
    assert os.access(find_binary(), os.X_OK)


def test_copy_is_execute_only_and_named_after_its_version(tmp_path, source):
    copy = install_binary(tmp_path / "data", source)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o111
    assert copy.name.startswith("claude-9.8.7-")
    assert copy.stat().st_size == source.stat().st_size


def test_second_install_reuses_the_copy(tmp_path, source):
    first = install_binary(tmp_path, source).stat()
    assert install_binary(tmp_path, source).stat().st_ino == first.st_ino


def test_install_of_a_new_version_keeps_the_old_copy(tmp_path, source):
    old = install_binary(tmp_path, source)
    source.with_name("claude.version").write_text("9.9.0")
    new = install_binary(tmp_path, source)
    assert new != old
    assert old.exists()


def test_partial_copy_left_by_a_crash_is_replaced(tmp_path, source):
    directory = tmp_path / "agent"
    directory.mkdir()
    (directory / "partial").write_bytes(b"half")
    assert install_binary(tmp_path, source).stat().st_size == source.stat().st_size
    assert not (directory / "partial").exists()


def test_concurrent_installs_create_one_complete_copy(tmp_path, source):
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: install_binary(tmp_path, source), range(8)))
    (copy,) = copies
    assert copy.stat().st_size == source.stat().st_size


def test_missing_wheel_error_names_the_fix(monkeypatch):
    monkeypatch.setattr("sandbox.agents.claude_code.agent._PACKAGE", "no_such_package")
    with pytest.raises(BinaryMissingError, match="install the claude-agent-sdk wheel"):
        find_binary()
