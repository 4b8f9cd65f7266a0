"""Makes images: of packages as a declarative file says, or of what another tool has saved."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from sandbox.profiles.debian import add_packages
from sandbox.profiles.declaration import Declaration, check_tier
from sandbox.profiles.oci import add_layers
from sandbox.profiles.part import Part, add_part
from sandbox.profiles.place import ProfilePlace
from sandbox.profiles.record import ImageRecord
from sandbox.profiles.seal import measure, packages, prepare
from sandbox.profiles.tree import Tree

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
