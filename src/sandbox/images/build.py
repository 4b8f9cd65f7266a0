"""Makes images: of packages as a declarative file says, or of what another tool has saved."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from sandbox.images.debian import add_packages
from sandbox.images.definition import Declaration, check_tier
from sandbox.images.errors import BuildFailedError
from sandbox.images.finalize import measure, packages, prepare
from sandbox.images.image_store import ImageRecord, ProfilePlace
from sandbox.images.oci.importer import add_layers
from sandbox.images.rootfs import Tree


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


AddPackages = Callable[[Declaration, Tree, Path], None]


def build_image(
    place: ProfilePlace,
    declaration: Declaration,
    parts: Mapping[str, Part],
    add: AddPackages = add_packages,
) -> ImageRecord:
    """Build what is declared; it is current when this returns, and nothing has changed when this raises.

    Raises BuildFailedError, ImageRefusedError, ProfileBusyError, OSError.
    """
    day = declaration.date
    mtime = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    with place.building() as part:
        tree = _plant(part)
        add(declaration, tree, part)
        tree.begin_layer()
        for name in declaration.parts:
            add_part(name, parts.get(name), tree, mtime)
        for path, text in declaration.files.items():
            content = text.encode()
            tree.add_file(path, BytesIO(content), len(content), is_executable=content[:2] == b"#!", mtime=mtime)
        versions = {key: value for name in declaration.parts for key, value in parts[name].versions.items()}
        return _finish(place, part, tree, "packages of this machine's apt", declaration.minimum_tier, versions)


def import_image(place: ProfilePlace, file: Path, minimum_tier: str = "") -> ImageRecord:
    """Take an OCI archive over; the same holds as for a build. Raises ImageRefusedError, ProfileBusyError, OSError."""
    check_tier(minimum_tier)
    with place.building() as part:
        tree = _plant(part)
        digest = add_layers(file, tree, part)
        return _finish(place, part, tree, f"OCI image {digest}", minimum_tier, {})


def _plant(part: Path) -> Tree:
    root = part / "root"
    root.mkdir()
    root.chmod(0o755)
    return Tree(root)


def _finish(
    place: ProfilePlace, part: Path, tree: Tree, source: str, minimum_tier: str, versions: Mapping[str, str]
) -> ImageRecord:
    prepare(tree)
    found = measure(tree.root)
    record = ImageRecord(
        profile=place.name,
        digest=found.digest,
        created_at=datetime.now(UTC).replace(microsecond=0),
        source=source,
        size_bytes=found.size_bytes,
        entries=found.entries,
        versions={**packages(tree), **versions},
        minimum_tier=minimum_tier,
    )
    return place.install(part, record)
