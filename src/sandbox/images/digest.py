"""Computes the digest that identifies an image by its content."""

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """Identifies the content of an image.

    digest: SHA-256 of a tar of the tree, in which names are sorted and owners omitted. size_bytes: total size of all
    regular files. entries: number of files, directories and links.
    """

    digest: str
    size_bytes: int
    entries: int


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
    # Read only names: scandir's entries contain whole paths, which can total several gigabytes.
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
