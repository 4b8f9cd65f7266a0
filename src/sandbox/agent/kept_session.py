"""Claude Code's own record of a session, in a home that an agent has had to itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from sandbox.contracts.locked_entry import open_unlocked

PROJECTS_LOOKED_AT_MAX = 1000
"""Claude Code keeps a directory for each place that it was started in; an agent can make any number of them."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_kept(home: Path, session_id: str) -> bool:
    """Whether its transcript is there as a regular file: names are looked at, nothing is read and no link followed."""
    try:
        with _opened(str(home)) as top, _opened(".claude", top) as settings, _opened("projects", settings) as projects:
            with os.scandir(projects) as entries:
                names = [entry.name for entry in islice(entries, PROJECTS_LOOKED_AT_MAX)]
            return any(_has_file(projects, name, f"{session_id}.jsonl") for name in names)
    except OSError:
        return False


def _has_file(projects: int, project: str, name: str) -> bool:
    try:
        with _opened(project, projects) as directory:
            return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


@contextmanager
def _opened(name: str, parent: int | None = None) -> Iterator[int]:
    directory = open_unlocked(name, _DIRECTORY, parent)
    try:
        yield directory
    finally:
        os.close(directory)
