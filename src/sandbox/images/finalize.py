"""Finalizes a root file system: creates mount points, removes private files, computes its digest."""

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from sandbox.images.definition import IMAGE_PACKAGES_BYTES_MAX
from sandbox.images.errors import ImageRefusedError
from sandbox.images.rootfs import RootFs
from sandbox.interfaces.file_layout import SANDBOX_HOME, SANDBOX_WORKSPACE
from sandbox.interfaces.images import IMAGE_DIRECTORIES, IMAGE_FILES

_EMPTIED_DIRECTORIES = ("/dev", SANDBOX_HOME, "/proc", "/run", "/sys", "/tmp", SANDBOX_WORKSPACE)  # noqa: S108
_PRIVATE_FILES = ("passwd-", "group-", "shadow", "shadow-", "gshadow", "gshadow-", "machine-id")
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
_DPKG_STATUS = "/var/lib/dpkg/status"
_STATUS_BYTES_MAX = 64 * 1024**2
_INSTALLED_STATUS = "install ok installed"
_PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]*", re.ASCII)
_PACKAGE_VERSION = re.compile(r"[A-Za-z0-9.+:~-]+", re.ASCII)
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """Identifies the content of an image.

    digest: SHA-256 of a tar of the tree, with sorted names and without owners. size_bytes: total size of all regular
    files. entries: number of files, directories and links.
    """

    digest: str
    size_bytes: int
    entries: int


def finalize(rootfs: RootFs) -> None:
    """Create the paths that runtimes mount over, and remove private files.

    Raises ImageRefusedError if no agent could start in this tree.
    """
    for directory in _EMPTIED_DIRECTORIES:
        rootfs.remove(directory)
    for directory in IMAGE_DIRECTORIES:
        rootfs.add_directory(directory)
    for name in _PRIVATE_FILES:
        rootfs.remove(f"/etc/{name}")
    for path in IMAGE_FILES:
        rootfs.add_file(path, BytesIO(), 0, is_executable=False, mtime=0)
    rootfs.add_link("/var/tmp", "../tmp")  # noqa: S108
    loader = _LOADERS.get(os.uname().machine, "/bin/sh")
    for program in ("/bin/sh", loader):
        found = rootfs.resolve(program)
        if found is None or not Path(found).is_file():
            raise ImageRefusedError(f"The image has no {program}; agents need a shell and the GNU C library.")


def read_packages(rootfs: RootFs) -> dict[str, str]:
    """Return the names and versions of the packages in the image's dpkg database. Invalid entries are omitted.

    Raises ImageRefusedError if they are larger than IMAGE_PACKAGES_BYTES_MAX.
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


def compute_digest(root: Path) -> TreeDigest:
    """Read the whole tree once and compute its digest."""
    digest = hashlib.sha256()
    size = entries = 0
    for path, name in _walk(str(root), "."):
        status = os.lstat(path)
        digest.update(_header(path, name, status))
        entries += 1
        if stat.S_ISREG(status.st_mode):
            size += status.st_size
            _hash_file(path, status.st_size, digest.update)
    digest.update(bytes(1024))
    return TreeDigest(f"sha256:{digest.hexdigest()}", size, entries)


def _walk(path: str, name: str) -> Iterator[tuple[str, str]]:
    yield path, name
    # Read only names: scandir's entries contain whole paths, in total up to several gigabytes.
    for child in map(os.fsdecode, sorted(os.listdir(os.fsencode(path)))):  # noqa: PTH208
        if stat.S_ISDIR(os.lstat(f"{path}/{child}").st_mode):
            yield from _walk(f"{path}/{child}", f"{name}/{child}")
        else:
            yield f"{path}/{child}", f"{name}/{child}"


def _header(path: str, name: str, status: os.stat_result) -> bytes:
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777  # noqa: PTH115
    else:
        info.size, info.mtime = status.st_size, int(status.st_mtime)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _hash_file(path: str, size: int, update: Callable[[bytes], None]) -> None:
    with open(path, "rb") as file:  # noqa: PTH123
        while chunk := file.read(_CHUNK_BYTES):
            update(chunk)
    update(bytes(-size % 512))
