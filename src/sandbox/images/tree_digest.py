"""Computes the digest of a tree of files, and reads the tree as a tar with that digest."""

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 256 * 1024
"""Maximum size of the parts in which a tree is read."""

_END_OF_ARCHIVE = bytes(1024)


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """Identifies the content of an image.

    digest: SHA-256 of a tar of the tree, in which names are sorted and owners omitted. size_bytes: total size of all
    regular files. entry_count: number of files, directories and links.
    """

    digest: str
    size_bytes: int
    entry_count: int


def compute_digest(root: Path) -> TreeDigest:
    """Read the whole tree once and compute its digest."""
    digest = hashlib.sha256()
    size = entry_count = 0
    for path, name in _walk(str(root), "."):
        status = os.lstat(path)
        entry_count += 1
        size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        for chunk in _read_entry(path, name, status):
            digest.update(chunk)
    digest.update(_END_OF_ARCHIVE)
    return TreeDigest(f"sha256:{digest.hexdigest()}", size, entry_count)


def read_tree(root: Path) -> Iterator[bytes]:
    """Yield a tree as a tar, whose SHA-256 is the tree's digest, in parts of at most CHUNK_BYTES. Raises OSError."""
    for path, name in _walk(str(root), "."):
        yield from _read_entry(path, name, os.lstat(path))
    yield _END_OF_ARCHIVE


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


def _read_entry(path: str, name: str, status: os.stat_result) -> Iterator[bytes]:
    yield _header(path, name, status)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:  # noqa: PTH123
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        yield bytes(-status.st_size % 512)
