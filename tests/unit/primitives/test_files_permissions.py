"""Files that the agent made inaccessible can be opened. Failures leak no descriptors."""

import errno
import os
from pathlib import Path

import pytest

from sandbox.primitives.files import open_granting_access

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
