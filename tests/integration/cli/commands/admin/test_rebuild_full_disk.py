"""On a full disk, `sandbox admin` reports the lack of space instead of a damaged index."""

import os
import subprocess
import sys

import pytest

from doubles.stored_tasks import StoredTasks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")

FILL_DISK_SCRIPT = """
mount -t tmpfs -o size=4m tmpfs "$1" && cp -r "$2" "$1/data" || exit 99
cat /dev/zero > "$1/fill" 2> /dev/null
[ -z "$5" ] || rm "$1/fill"
exec "$3" -m sandbox admin "$4" --data-dir "$1/data"
"""

REBUILD_ON_SMALL_DISK = """
mount -t tmpfs -o size=8m tmpfs "$1" && cp -r "$2" "$1/data" || exit 99
exec "$3" -c "$4" "$1/data"
"""
REBUILD_WITH_GROWING_SPACE = """
import os, sys
from pathlib import Path
from sandbox.interfaces.store import StoreError
from sandbox.bootstrap.data_dir_maintenance import check_data_dir, rebuild_index
from sandbox.store.database import StoreUnusableError

data = Path(sys.argv[1])
fill, outcomes = data.parent / "fill", []
for free_bytes in range(256 * 1024, 3 * 1024 * 1024, 128 * 1024):
    disk = os.statvfs(data)
    with fill.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - free_bytes)
    try:
        rebuild_index(data)
        outcomes.append("rebuilt")
    except (StoreError, StoreUnusableError) as error:
        assert "free " in error.message, error.message
        outcomes.append("refused")
    fill.unlink()
    assert check_data_dir(data, deep=False)[1] == [], free_bytes
print(*outcomes)
"""


@pytest.fixture
def run(tmp_path):
    tasks = StoredTasks(tmp_path / "data")
    tasks.add_completed_task("task-1")
    tasks.index()
    (tmp_path / "small").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}

    def run(command, *, has_space):
        arguments = (tmp_path / "small", tmp_path / "data", sys.executable)
        script = (
            "unshare",
            "--mount",
            "sh",
            "-c",
            FILL_DISK_SCRIPT,
            "sh",
            *map(str, arguments),
            command,
            "yes" if has_space else "",
        )
        return subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, env=environment)

    return run


@pytest.mark.parametrize(("command", "code"), [("check", 1), ("rebuild", 10)])
def test_full_disk_is_reported_and_commands_work_once_space_is_free(run, command, code):
    result = run(command, has_space=False)
    assert result.returncode == code
    assert "free " in result.stdout + result.stderr
    assert "if it is damaged" not in result.stdout + result.stderr

    assert run(command, has_space=True).returncode == 0


def test_incomplete_new_index_does_not_replace_the_old_one(tmp_path):
    """The disk has space for the WAL of the new index but not for the index; SQLite reports no error in this case."""
    tasks = StoredTasks(tmp_path / "data")
    for number in range(60):
        tasks.add_completed_task(f"task-{number}", claude={"allowed_tools": ("t" * 250,) * 40})
    tasks.index()
    (tmp_path / "small").mkdir()
    script = ("unshare", "--mount", "sh", "-c", REBUILD_ON_SMALL_DISK, "sh")
    arguments = (str(tmp_path / "small"), str(tmp_path / "data"), sys.executable, REBUILD_WITH_GROWING_SPACE)
    result = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == {"rebuilt", "refused"}
