"""What an agent locked is opened, or nothing of it stays open."""

import errno
import os
from pathlib import Path

import pytest

from sandbox.system.files import open_restricted

OPEN = Path("/proc/self/fd")


def test_a_directory_that_cannot_be_unlocked_is_not_left_open(tmp_path, monkeypatch):
    def refuse(descriptor, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "fchmod", refuse)
    before = sorted(OPEN.iterdir())
    with pytest.raises(OSError, match="Read-only"):
        open_restricted(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(OPEN.iterdir()) == before
