"""Bounds are counted by a clock that only goes forward: who reads the wall clock is known, and why."""

import ast
from pathlib import Path

WALL_CLOCKS = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today", "fromtimestamp"}
OF_MODULES = {"time", "datetime", "date", "dt"}

READERS = {
    "bootstrap/clock.py": "the one clock of server and runners",
    "auth/token_file.py": "tokens expire at a date",
    "images/build.py": "an image says when it was built",
    "server/artifact_store.py": "an artifact says when it was stored",
    "dashboard/pages/server.py": "the last day is counted in hours of the wall",
    "server/drain.py": "a drain says since when",
    "bootstrap/backup/create.py": "a backup says when it was made",
    "bootstrap/log.py": "lines of the log say when they were written",
}
USERS_SIDE = ("cli", "client", "demo")


def test_nobody_else_reads_the_wall_clock(root: Path, trees: dict[Path, ast.Module]):
    package = root / "src" / "sandbox"
    found = {
        str(path.relative_to(package))
        for path, tree in trees.items()
        if path.is_relative_to(package) and path.relative_to(package).parts[0] not in USERS_SIDE
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in WALL_CLOCKS
        and isinstance(node.value, ast.Name)
        and node.value.id in OF_MODULES
    }
    assert found == set(READERS)
