"""Builds images from the packages of a definition file, or imports them from an OCI archive."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from sandbox.images.debian_packages import install_packages, read_packages
from sandbox.images.errors import BuildFailedError, ImageRefusedError
from sandbox.images.image_store import ImageMetadata, ImageStore, compute_digest
from sandbox.images.oci_import import import_layers
from sandbox.images.profiles import ImageDefinition, check_tier
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.interfaces.images import MOUNT_POINT_DIRECTORIES, MOUNT_POINT_FILES
from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE

_EMPTIED_DIRECTORIES = ("/dev", SANDBOX_HOME, "/proc", "/run", "/sys", "/tmp", SANDBOX_WORKSPACE)  # noqa: S108
_PRIVATE_FILES = ("passwd-", "group-", "shadow", "shadow-", "gshadow", "gshadow-", "machine-id")
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}


@dataclass(frozen=True, slots=True)
class Component:
    """Files that are copied into an image.

    paths: paths in the image, keyed by host file or directory. links: link targets, keyed by path in the image. files:
    contents, keyed by path in the image. versions: versions of programs, keyed by name, for the image's metadata.
    """

    paths: Mapping[Path, str]
    links: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def add_component(name: str, component: Component | None, rootfs: RootFsWriter, mtime: float) -> None:
    """Copy the component into an image. Raises BuildFailedError, OSError."""
    if component is None or not component.paths:
        raise BuildFailedError(f"The profile needs {name!r}, which is not installed; run sandbox setup.")
    for source, image_path in component.paths.items():
        for path, target in _files(source, image_path):
            _copy_entry(path, target, rootfs, mtime)
    for link, target in component.links.items():
        rootfs.add_link(link, target)
    for image_path, content in component.files.items():
        rootfs.add_file(image_path, BytesIO(content), len(content), is_executable=False, mtime=mtime)


def _files(source: Path, image_path: str) -> Iterator[tuple[Path, str]]:
    if not source.is_dir():
        yield source, image_path
        return
    for directory, names, files in os.walk(source):
        names.sort()
        directory_in_image = f"{image_path}/{Path(directory).relative_to(source)}"
        links = [name for name in names if Path(directory, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield Path(directory, name), f"{directory_in_image}/{name}"


def _copy_entry(path: Path, image_path: str, rootfs: RootFsWriter, mtime: float) -> None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        rootfs.add_link(image_path, str(path.readlink()))
        return
    with path.open("rb") as content:
        is_executable = bool(status.st_mode & 0o111)
        rootfs.add_file(image_path, content, status.st_size, is_executable=is_executable, mtime=mtime)


InstallPackages = Callable[[ImageDefinition, RootFsWriter, Path], None]


def build_image(
    store: ImageStore,
    definition: ImageDefinition,
    components: Mapping[str, Component],
    install_packages: InstallPackages = install_packages,
) -> ImageMetadata:
    """Build an image and make it the profile's current image. If the build fails, the current image does not change.

    Raises BuildFailedError, ImageRefusedError, ProfileBusyError, OSError.
    """
    day = definition.snapshot_date
    mtime = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    with store.build_directory() as part:
        tree = create_rootfs(part)
        install_packages(definition, tree, part)
        tree.start_layer()
        for name in definition.components:
            add_component(name, components.get(name), tree, mtime)
        for path, text in definition.files.items():
            content = text.encode()
            tree.add_file(path, BytesIO(content), len(content), is_executable=content[:2] == b"#!", mtime=mtime)
        versions = {key: value for name in definition.components for key, value in components[name].versions.items()}
        return _install_image(store, part, tree, "packages of this machine's apt", definition.minimum_tier, versions)


def import_image(store: ImageStore, archive: Path, minimum_tier: str = "") -> ImageMetadata:
    """Import an OCI archive and make it the current image; see `build_image`.

    Raises ImageRefusedError, ProfileBusyError, OSError.
    """
    check_tier(minimum_tier)
    with store.build_directory() as part:
        tree = create_rootfs(part)
        digest = import_layers(archive, tree, part)
        return _install_image(store, part, tree, f"OCI image {digest}", minimum_tier, {})


def create_rootfs(build_directory: Path) -> RootFsWriter:
    """Create the directory of a new image's files."""
    root = build_directory / "root"
    root.mkdir()
    root.chmod(0o755)
    return RootFsWriter(root)


def _install_image(
    store: ImageStore,
    build_directory: Path,
    rootfs: RootFsWriter,
    source: str,
    minimum_tier: str,
    component_versions: Mapping[str, str],
) -> ImageMetadata:
    finalize(rootfs)
    digest = compute_digest(rootfs.root)
    metadata = ImageMetadata(
        profile=store.name,
        digest=digest.digest,
        created_at=datetime.now(UTC).replace(microsecond=0),
        source=source,
        size_bytes=digest.size_bytes,
        entry_count=digest.entry_count,
        package_versions={**read_packages(rootfs), **component_versions},
        minimum_tier=minimum_tier,
    )
    return store.install(build_directory, metadata)


def finalize(rootfs: RootFsWriter) -> None:
    """Create the paths that runtimes mount over, and remove private files.

    Raises ImageRefusedError if no agent could start in this tree.
    """
    for directory in _EMPTIED_DIRECTORIES:
        rootfs.remove(directory)
    for directory in MOUNT_POINT_DIRECTORIES:
        rootfs.add_directory(directory)
    for name in _PRIVATE_FILES:
        rootfs.remove(f"/etc/{name}")
    for path in MOUNT_POINT_FILES:
        rootfs.add_file(path, BytesIO(), 0, is_executable=False, mtime=0)
    rootfs.add_link("/var/tmp", "../tmp")  # noqa: S108
    loader = _LOADERS.get(os.uname().machine, "/bin/sh")
    for program in ("/bin/sh", loader):
        found = rootfs.resolve(program)
        if found is None or not Path(found).is_file():
            raise ImageRefusedError(f"The image has no {program}; agents need a shell and the GNU C library.")
