"""Files that the agent made inaccessible can be opened, and files are written durably. Failures leak no descriptors."""

import errno
import os
from pathlib import Path

import pytest

from sandbox.primitives.files import open_granting_access, write_durably

DESCRIPTOR_DIRECTORY = Path("/proc/self/fd")


def test_failed_unlock_closes_the_descriptor(tmp_path, monkeypatch):
    def refuse(descriptor, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "fchmod", refuse)
    before = sorted(DESCRIPTOR_DIRECTORY.iterdir())
    with pytest.raises(OSError, match="Read-only"):
        open_granting_access(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(DESCRIPTOR_DIRECTORY.iterdir()) == before


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "state.json"
    write_durably(target, b"first")
    write_durably(target, b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sandbox.primitives.files.fsync_path", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_durably(target, b"third")
    assert target.read_bytes() == b"second"
