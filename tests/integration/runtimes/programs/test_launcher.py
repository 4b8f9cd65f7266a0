"""Directories and files of the host are overlaid in a sandbox, or bind-mounted if an overlay would not contain them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")

PROGRAM = """
import sys
from sandbox.runtimes.programs.launcher import _has_mounts_below
print([_has_mounts_below(path) for path in sys.argv[1:]])
"""


def test_file_systems_under_a_directory_are_found(tmp_path):
    """A directory that contains a mount point is bind-mounted: in an overlay, the mount point would be empty."""
    for name in ("usr/local", "usr-other/local"):
        (tmp_path / name).mkdir(parents=True)
    mount = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    names = [tmp_path / "usr", tmp_path / "usr-other", tmp_path / "usr/local"]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path / "usr/local", sys.executable, "-c", PROGRAM]
    completed = subprocess.run([*command, *names], capture_output=True, text=True, timeout=30, check=True)
    assert completed.stdout == "[True, False, False]\n"


OVERLAY_PROGRAM = """
import os, sys
from sandbox.runtimes.programs import launcher
for path in sys.argv[1:]:
    entry = ("overlay", "file", path)
    launcher.expose_entries([entry], None)
    target = launcher.EXPOSED_DIRECTORY + "/file"
    is_overlaid = os.stat(target).st_dev != os.stat(path).st_dev
    print(is_overlaid, open(target).read())
"""


def test_mounted_and_linked_files_are_bind_mounted_and_plain_files_are_overlaid(tmp_path):
    """A mounted or linked file is bind-mounted, because an overlay of its directory would not contain the file."""
    for name in ("plain", "mounted", "other"):
        (tmp_path / name).write_text(f"{name} file")
    (tmp_path / "link").symlink_to("/etc/hostname")
    mount = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    paths = [tmp_path / "plain", tmp_path / "mounted", tmp_path / "link"]
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path / "other", tmp_path / "mounted"]
    completed = subprocess.run(
        [*command, sys.executable, "-c", OVERLAY_PROGRAM, *paths],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    host_name = Path("/etc/hostname").read_text()
    assert completed.stdout == f"True plain file\nFalse other file\nFalse {host_name}\n"
