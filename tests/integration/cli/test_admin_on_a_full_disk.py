"""On a disk without a free byte `sandbox admin` asks for room, and blames no index."""

import os
import subprocess
import sys

import pytest

from doubles.kept_tasks import KeptTasks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")

FILL = """
mount -t tmpfs -o size=4m tmpfs "$1" && cp -r "$2" "$1/data" || exit 99
cat /dev/zero > "$1/fill" 2> /dev/null
[ -z "$5" ] || rm "$1/fill"
exec "$3" -m sandbox admin "$4" --data-dir "$1/data"
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
