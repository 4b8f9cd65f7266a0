"""On a disk without a free byte `sandbox admin` asks for room, and blames no index."""

import os
import subprocess
import sys

import pytest

from doubles.stored_tasks import KeptTasks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")

FILL = """
mount -t tmpfs -o size=4m tmpfs "$1" && cp -r "$2" "$1/data" || exit 99
cat /dev/zero > "$1/fill" 2> /dev/null
[ -z "$5" ] || rm "$1/fill"
exec "$3" -m sandbox admin "$4" --data-dir "$1/data"
"""

REBUILD_EVER_ROOMIER = """
mount -t tmpfs -o size=8m tmpfs "$1" && cp -r "$2" "$1/data" || exit 99
exec "$3" -c "$4" "$1/data"
"""
ROOMS = """
import os, sys
from pathlib import Path
from sandbox.interfaces.store import StoreError
from sandbox.bootstrap.administration import check_data_dir, rebuild_index

data = Path(sys.argv[1])
fill, told = data.parent / "fill", []
for room in range(256 * 1024, 3 * 1024 * 1024, 128 * 1024):
    there = os.statvfs(data)
    with fill.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - room)
    try:
        rebuild_index(data)
        told.append("rebuilt")
    except StoreError as error:
        assert "make room" in error.message, error.message
        told.append("refused")
    fill.unlink()
    assert check_data_dir(data, deep=False)[1] == [], room
print(*told)
"""


@pytest.fixture
def run(tmp_path):
    made = KeptTasks(tmp_path / "data")
    made.finish("task-1")
    made.index()
    (tmp_path / "small").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}

    def run(command, *, has_room):
        places = (tmp_path / "small", tmp_path / "data", sys.executable)
        script = ("unshare", "--mount", "sh", "-c", FILL, "sh", *map(str, places), command, "yes" if has_room else "")
        return subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, env=environment)

    return run


@pytest.mark.parametrize(("command", "code"), [("check", 1), ("rebuild", 10)])
def test_it_says_to_make_room_and_works_once_there_is_some(run, command, code):
    refused = run(command, has_room=False)
    assert refused.returncode == code
    assert "make room" in refused.stdout + refused.stderr
    assert "move it away" not in refused.stdout + refused.stderr

    assert run(command, has_room=True).returncode == 0


def test_an_index_that_has_not_wholly_come_to_disk_replaces_none(tmp_path):
    """There is room for what SQLite logs of the new index and not for the index, which it does not complain of."""
    made = KeptTasks(tmp_path / "data")
    for number in range(60):
        made.finish(f"task-{number}", claude={"allowed_tools": ("t" * 250,) * 40})
    made.index()
    (tmp_path / "small").mkdir()
    script = ("unshare", "--mount", "sh", "-c", REBUILD_EVER_ROOMIER, "sh")
    places = (str(tmp_path / "small"), str(tmp_path / "data"), sys.executable, ROOMS)
    done = subprocess.run([*script, *places], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"rebuilt", "refused"}
