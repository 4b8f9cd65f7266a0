"""Session files of Claude Code, in the home directory of a sandbox. The directory is untrusted."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from sandbox.primitives.file_permissions import open_granting_access

PROJECTS_SCANNED_MAX = 1000
"""Maximum number of project directories to search. Claude Code creates one per start directory; agents may add more."""

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def session_file(directory: str, session_id: str) -> str:
    """Return the path of a session's file under the home directory. directory: where Claude Code starts."""
    return f".claude/projects/{re.sub('[^A-Za-z0-9]', '-', directory)}/{session_id}.jsonl"


def has_session_file(home: Path, session_id: str) -> bool:
    """Return whether the session's file exists and is regular. Opens only directories, and does not follow links."""
    try:
        with _open_projects(home) as projects:
            return any(_has_file(projects, name, f"{session_id}.jsonl") for name in _project_names(projects))
    except OSError:
        return False


def read_session_file(home: Path, session_id: str, bytes_max: int) -> bytes | None:
    """Return the content of the session's file; None if it is missing, empty or larger than `bytes_max`.

    Does not follow links. The file may be any regular file that the agent put there.
    """
    try:
        with _open_projects(home) as projects:
            for name in sorted(_project_names(projects)):
                if _has_file(projects, name, f"{session_id}.jsonl"):
                    return _read_bounded(projects, name, f"{session_id}.jsonl", bytes_max)
    except OSError:
        pass
    return None


def _read_bounded(projects: int, project: str, name: str, bytes_max: int) -> bytes | None:
    with _open_directory(project, projects) as directory:
        descriptor = open_granting_access(name, _FILE_FLAGS, directory)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            content = file.read(bytes_max + 1)
    return content if 0 < len(content) <= bytes_max else None


@contextmanager
def _open_projects(home: Path) -> Iterator[int]:
    with (
        _open_directory(str(home)) as top,
        _open_directory(".claude", top) as settings,
        _open_directory("projects", settings) as projects,
    ):
        yield projects


def _project_names(projects: int) -> list[str]:
    with os.scandir(projects) as entries:
        return [entry.name for entry in islice(entries, PROJECTS_SCANNED_MAX)]


def _has_file(projects: int, project: str, name: str) -> bool:
    try:
        with _open_directory(project, projects) as directory:
            return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


@contextmanager
def _open_directory(name: str, parent: int | None = None) -> Iterator[int]:
    directory = open_granting_access(name, _DIRECTORY_FLAGS, parent)
    try:
        yield directory
    finally:
        os.close(directory)
