"""Builds images from the packages of a definition file, or imports them from an OCI archive.

mmdebstrap installs packages of the machine's distribution. It uses the sources, keys, proxy and certificates of this
machine's apt, because the machine's operator decides where packages come from. No file of apt is copied into the image.
"""

import hashlib
import os
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import IO

import msgspec

from sandbox.images.image_store import ImageMetadata, ImageStore, compute_digest
from sandbox.images.limits import BUILD_TIMEOUT_SECONDS, IMAGE_BYTES_MAX, IMAGE_PACKAGES_BYTES_MAX
from sandbox.images.oci_import import import_layers
from sandbox.images.profiles import ImageDefinition, check_tier
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.images import MOUNT_POINT_DIRECTORIES, MOUNT_POINT_FILES, BuildFailedError, ImageRefusedError
from sandbox.interfaces.runtime import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.model.errors import SandboxError

_PROGRAM = "/usr/bin/mmdebstrap"
_APT_CONFIG = "/usr/bin/apt-config"
_NAMESPACE_COMMAND = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--", "/usr/bin/unshare", "--mount", "--pid", "--fork")
_NAMESPACE_OPTIONS = ("--kill-child=KILL", "--mount-proc", "--")
"""Runs the build in its own namespaces, which this process keeps alive: no process or mount outlives a killed build."""

_HOOK_DIRECTORY = Path("/usr/share/mmdebstrap/hooks/file-mirror-automount")
_EXCLUDED_PATHS = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")
_HOST_SPECIFIC_PATHS = ("/etc/apt", "/var/lib/apt", "/var/cache", "/var/log", "/etc/dpkg/dpkg.cfg.d")
_APT_SETTING_PREFIXES = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries", "Acquire::ForceIPv")
_PASSED_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
_COMMAND_SECONDS = 30
_LOG_BYTES_MAX = 2000
_DPKG_STATUS = "/var/lib/dpkg/status"
_STATUS_BYTES_MAX = 64 * 1024**2
_INSTALLED_STATUS = "install ok installed"
_PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]*", re.ASCII)
_PACKAGE_VERSION = re.compile(r"[A-Za-z0-9.+:~-]+", re.ASCII)


def install_packages(definition: ImageDefinition, rootfs: RootFsWriter, scratch: Path, program: str = _PROGRAM) -> None:
    """Install the packages into the root file system. Raises BuildFailedError, ImageRefusedError, OSError.

    scratch: a private directory for mmdebstrap's temporary files.
    """
    if os.geteuid() != 0:
        raise BuildFailedError("Only root can build an image; an ordinary user can import one (--from-oci).")
    if not Path(program).exists():
        raise BuildFailedError("mmdebstrap is missing; install it: apt-get install mmdebstrap")
    settings = scratch / "apt.conf"
    settings.write_text("".join(f"{line}\n" for line in _read_apt_settings()))
    argv = [*_NAMESPACE_COMMAND, *_NAMESPACE_OPTIONS, *_mmdebstrap_command(definition, settings, program)]
    with (scratch / "mmdebstrap.log").open("w+b") as log_file:
        _run_mmdebstrap(argv, _environment(definition, scratch), log_file, rootfs)
    for path in _HOST_SPECIFIC_PATHS:
        rootfs.remove(path)
    for path in ("/var/cache", "/var/log"):
        rootfs.add_directory(path)


def find_sources(directory: Path = Path("/etc/apt")) -> list[Path]:
    """Return the files that list the package sources of this machine's apt. Raises BuildFailedError."""
    listed = [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]
    sources = [path for path in listed if path.suffix in {".list", ".sources"} and _has_source(path)]
    if not sources:
        raise BuildFailedError("This machine's apt has no package sources; add one to /etc/apt/sources.list.d.")
    return sources


def _has_source(path: Path) -> bool:
    if not path.is_file():
        return False
    lines = path.read_text(errors="replace").splitlines()
    return any(line.startswith(("deb ", "deb\t", "Types:")) for line in lines)


def _read_apt_settings() -> Iterator[str]:
    try:
        completed = subprocess.run(
            [_APT_CONFIG, "dump"], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True, env={}
        )
    except subprocess.SubprocessError as error:
        raise BuildFailedError(f"The settings of this machine's apt cannot be read: {error}") from error
    yield from (line for line in completed.stdout.splitlines() if line.startswith(_APT_SETTING_PREFIXES))
    yield 'Dir::Etc::netrc "/etc/apt/auth.conf";'
    yield 'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";'


def _read_suite() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip("\"'")
    raise BuildFailedError("/etc/os-release does not name a release of Debian or Ubuntu.")


def _mmdebstrap_command(definition: ImageDefinition, settings: Path, program: str) -> Iterator[str]:
    yield from (program, "--mode=root", "--format=tar", "--variant=essential", f"--aptopt={settings}")
    yield from (f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED_PATHS)
    if definition.packages:
        yield f"--include={','.join(sorted(definition.packages))}"
    if _HOOK_DIRECTORY.is_dir():
        yield f"--hook-dir={_HOOK_DIRECTORY}"
    yield from (_read_suite(), "-", *map(str, find_sources()))


def _environment(definition: ImageDefinition, scratch: Path) -> dict[str, str]:
    midnight = datetime(
        definition.snapshot_date.year, definition.snapshot_date.month, definition.snapshot_date.day, tzinfo=UTC
    )
    return {
        **{name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ},
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(scratch),
        "SOURCE_DATE_EPOCH": str(int(midnight.timestamp())),
    }


def _run_mmdebstrap(argv: Sequence[str], environment: dict[str, str], log: IO[bytes], rootfs: RootFsWriter) -> None:
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment, cwd="/"
    )
    assert process.stdout is not None
    kill_timer = threading.Timer(BUILD_TIMEOUT_SECONDS, process.kill)
    kill_timer.start()
    try:
        apply_layer(TarStream(process.stdout, ByteBudget(IMAGE_BYTES_MAX)), rootfs)
        code = process.wait(timeout=_COMMAND_SECONDS)
    except ImageRefusedError as error:
        # A truncated tar means that mmdebstrap failed. The log of mmdebstrap has a better message than tarfile's error.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_COMMAND_SECONDS)
        raise BuildFailedError(f"mmdebstrap failed: {_last_log_lines(log) or error}") from error
    finally:
        kill_timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    if code != 0:
        raise BuildFailedError(f"mmdebstrap failed: {_last_log_lines(log)}")


def _last_log_lines(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(log.tell() - _LOG_BYTES_MAX, 0))
    lines = log.read().decode(errors="replace").splitlines()
    return " · ".join(line.strip() for line in lines[-6:] if line.strip())


def read_packages(rootfs: RootFsWriter) -> dict[str, str]:
    """Return the names and versions of the packages in the image's dpkg database. Invalid entries are omitted.

    Raises ImageRefusedError if the names and versions are larger than IMAGE_PACKAGES_BYTES_MAX.
    """
    path = rootfs.resolve(_DPKG_STATUS)
    if path is None or not stat.S_ISREG(os.lstat(path).st_mode):
        return {}
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        paragraphs = map(_fields, file.read(_STATUS_BYTES_MAX).split("\n\n"))
        packages = {one["Package"]: one["Version"] for one in paragraphs if _is_installed(one)}
    if sum(len(name) + len(version) for name, version in packages.items()) > IMAGE_PACKAGES_BYTES_MAX:
        raise ImageRefusedError(
            f"The names and versions of the packages exceed {IMAGE_PACKAGES_BYTES_MAX // 1024**2} MiB; install fewer."
        )
    return packages


def _is_installed(package: Mapping[str, str]) -> bool:
    return (
        package.get("Status") == _INSTALLED_STATUS
        and _PACKAGE_NAME.fullmatch(package.get("Package", "")) is not None
        and _PACKAGE_VERSION.fullmatch(package.get("Version", "")) is not None
    )


def _fields(paragraph: str) -> dict[str, str]:
    pairs = (line.partition(": ") for line in paragraph.split("\n"))
    return {name: value for name, mark, value in pairs if mark and not name.startswith(" ")}


def packages_digest(root: Path) -> str:
    """Return a digest of the installed packages and their versions; empty without a dpkg database."""
    try:
        packages = read_packages(RootFsWriter(root))
    except (OSError, SandboxError):
        return ""
    if not packages:
        return ""
    return f"sha256:{hashlib.sha256(msgspec.json.encode(sorted(packages.items()))).hexdigest()}"


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
