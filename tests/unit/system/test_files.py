"""Opening a file that the agent made inaccessible. A failure leaks no descriptor."""

import errno
import os
from pathlib import Path

import pytest

from sandbox.system.files import open_granting_access

OPEN_DESCRIPTORS = Path("/proc/self/fd")


def test_failed_unlock_closes_the_descriptor(tmp_path, monkeypatch):
    def refuse(descriptor, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "fchmod", refuse)
    before = sorted(OPEN_DESCRIPTORS.iterdir())
    with pytest.raises(OSError, match="Read-only"):
        open_granting_access(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(OPEN_DESCRIPTORS.iterdir()) == before
