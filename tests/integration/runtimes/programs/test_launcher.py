"""Views of the host's directories."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")

PROGRAM = """
import sys
from sandbox.runtimes.programs.launcher import _has_mounts_below
print([_has_mounts_below(path) for path in sys.argv[1:]])
"""


def test_file_systems_below_a_directory_are_found(tmp_path):
    """A directory that contains another file system is bound, because an overlay would show it empty."""
    for name in ("usr/local", "usr-other/local"):
        (tmp_path / name).mkdir(parents=True)
    mount = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    names = [tmp_path / "usr", tmp_path / "usr-other", tmp_path / "usr/local"]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path / "usr/local", sys.executable, "-c", PROGRAM]
    completed = subprocess.run([*command, *names], capture_output=True, text=True, timeout=30, check=True)
    assert completed.stdout == "[True, False, False]\n"
