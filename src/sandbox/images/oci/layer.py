"""Applies a layer of an image: a tar that is extracted over the earlier layers."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from sandbox.images.errors import ImageRefusedError
from sandbox.images.limits import IMAGE_METADATA_BYTES_MAX
from sandbox.images.oci.limited_streams import TarStream
from sandbox.images.rootfs_writer import RootFsWriter

_WHITEOUT = ".wh."
_OPAQUE_WHITEOUT = ".wh..wh..opq"
_RESERVED_PREFIX = ".wh..wh."
_GLOBAL_HEADERS_MAX = 100


def apply_layer(stream: TarStream, rootfs: RootFsWriter, *, has_whiteouts: bool = True) -> str:
    """Apply a layer. Returns the digest of the stream.

    has_whiteouts: names that start with `.wh.` remove files of earlier layers. Otherwise they are ordinary names.

    Owners and permissions are normalized: files are readable by everybody and writable by their owner, and have no
    setuid bits or capabilities.
    Devices and pipes are skipped, because the runtime creates /dev. Raises ImageRefusedError, or OSError if the disk is
    full.
    """
    rootfs.start_layer()
    with converting_tar_errors(), tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:") as tar:
        while (member := tar.next()) is not None:
            stream.end_header()
            check_global_headers(tar)
            cast("Any", tar).members.clear()  # otherwise tarfile would keep up to a million members
            if not (has_whiteouts and _apply_whiteout(member.name, rootfs)):
                _apply_member(tar, member, rootfs)
            stream.start_header()
    return stream.read_digest()


def check_global_headers(tar: tarfile.TarFile) -> None:
    """Check the global headers, which accumulate over all entries. Raises ImageRefusedError."""
    words = tar.pax_headers
    if len(words) > _GLOBAL_HEADERS_MAX or sum(map(len, words.values())) > IMAGE_METADATA_BYTES_MAX:
        raise ImageRefusedError(
            f"The image has more than {_GLOBAL_HEADERS_MAX} pax global headers, or they are larger than "
            f"{IMAGE_METADATA_BYTES_MAX // 1024**2} MiB."
        )


@contextmanager
def converting_tar_errors() -> Iterator[None]:
    """Convert errors of `tarfile` for invalid data to ImageRefusedError."""
    try:
        yield
    except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        raise ImageRefusedError(f"The image is damaged: {str(error)[:200] or type(error).__name__}.") from error


def _apply_member(tar: tarfile.TarFile, member: tarfile.TarInfo, rootfs: RootFsWriter) -> None:
    name = member.name
    if member.isdir():
        rootfs.add_directory(name)
    elif member.issym():
        rootfs.add_link(name, member.linkname)
    elif member.islnk():
        rootfs.add_hard_link(name, member.linkname)
    elif member.isreg():
        content: Any = tar.extractfile(member)
        is_executable = bool(member.mode & 0o111)
        rootfs.add_file(name, content, member.size, is_executable=is_executable, mtime=member.mtime)
    elif not member.isdev():
        raise ImageRefusedError(f"The image has an entry of unknown type: {name[:200]}")


def _apply_whiteout(name: str, rootfs: RootFsWriter) -> bool:
    """Apply an entry if it is a whiteout. Returns whether it is one. Raises ImageRefusedError."""
    base = name.rstrip("/").rpartition("/")[2]
    if not base.startswith(_WHITEOUT):
        return False
    parent = name.rstrip("/").removesuffix(base)
    if base == _OPAQUE_WHITEOUT:
        rootfs.apply_opaque_whiteout(parent)
    elif not base.startswith(_RESERVED_PREFIX):
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in {"", "."}:
            raise ImageRefusedError(f"The image has a whiteout without a name: {name[:200]}")
        rootfs.apply_whiteout(parent + hidden)
    return True
