"""Parts of an image that Sandbox brings itself."""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from sandbox.profiles.mistakes import BuildFailedError
from sandbox.profiles.tree import Tree


@dataclass(frozen=True, slots=True)
class Part:
    """What is copied. paths: host file or directory to path inside. links: path to target. versions: for the record."""

    paths: Mapping[Path, str]
    links: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def add_part(name: str, part: Part | None, tree: Tree, mtime: float) -> None:
    """Copy it into an image. Raises BuildFailedError, OSError."""
    if part is None or not part.paths:
        raise BuildFailedError(
            f"The profile has the part {name!r}, which this machine does not have; run script/setup."
        )
    for source, inside in part.paths.items():
        for path, target in _files(source, inside):
            _copy(path, target, tree, mtime)
    for link, target in part.links.items():
        tree.add_link(link, target)
    for inside, content in part.files.items():
        tree.add_file(inside, BytesIO(content), len(content), is_executable=False, mtime=mtime)


def _files(source: Path, inside: str) -> Iterator[tuple[Path, str]]:
    if not source.is_dir():
        yield source, inside
        return
    for directory, names, files in os.walk(source):
        names.sort()
        place = f"{inside}/{Path(directory).relative_to(source)}"
        links = [name for name in names if Path(directory, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield Path(directory, name), f"{place}/{name}"


def _copy(path: Path, inside: str, tree: Tree, mtime: float) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        tree.add_link(inside, str(path.readlink()))
        return
    with path.open("rb") as content:
        is_executable = bool(found.st_mode & 0o111)
        tree.add_file(inside, content, found.st_size, is_executable=is_executable, mtime=mtime)
