"""A layer of an image: a tar that is laid over what earlier ones left."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from sandbox.images.definition import IMAGE_METADATA_BYTES_MAX
from sandbox.images.errors import ImageRefusedError
from sandbox.images.oci.tar_stream import TarStream
from sandbox.images.rootfs import Tree

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_OWN = ".wh..wh."
_GLOBAL_WORDS_MAX = 100


def apply_layer(stream: TarStream, tree: Tree) -> str:
    """Lay it; gives the digest of the stream.

    Owners and rights become everybody's to read and nobody's to change: no setuid, no capabilities. Devices and
    pipes are left out, since a runtime lays /dev itself. Raises ImageRefusedError, and OSError for a full disk.
    """
    tree.begin_layer()
    with refusing_damage(), tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:") as tar:
        while (member := tar.next()) is not None:
            stream.end_header()
            refuse_many_words(tar)
            cast("Any", tar).members.clear()  # it would keep a million of them
            _apply(tar, member, tree)
            stream.begin_header()
    return stream.finish()


def refuse_many_words(tar: tarfile.TarFile) -> None:
    """Global headers add up from entry to entry. Raises ImageRefusedError."""
    words = tar.pax_headers
    if len(words) > _GLOBAL_WORDS_MAX or sum(map(len, words.values())) > IMAGE_METADATA_BYTES_MAX:
        raise ImageRefusedError("The image has too many global headers.")


@contextmanager
def refusing_damage() -> Iterator[None]:
    """`tarfile` has many words for bytes that are no tar."""
    try:
        yield
    except (tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        raise ImageRefusedError(f"The image is damaged: {str(error)[:200] or type(error).__name__}.") from error


def _apply(tar: tarfile.TarFile, member: tarfile.TarInfo, tree: Tree) -> None:
    name = member.name
    base = name.rstrip("/").rpartition("/")[2]
    if base.startswith(_WHITEOUT):
        _white_out(name, base, tree)
    elif member.isdir():
        tree.add_directory(name)
    elif member.issym():
        tree.add_link(name, member.linkname)
    elif member.islnk():
        tree.add_hard_link(name, member.linkname)
    elif member.isreg():
        content: Any = tar.extractfile(member)
        is_executable = bool(member.mode & 0o111)
        tree.add_file(name, content, member.size, is_executable=is_executable, mtime=member.mtime)
    elif not member.isdev():
        raise ImageRefusedError(f"The image has an entry of a kind that nobody knows: {name[:200]}")


def _white_out(name: str, base: str, tree: Tree) -> None:
    parent = name.rstrip("/").removesuffix(base)
    if base == _OPAQUE:
        tree.white_out_content(parent)
    elif not base.startswith(_OWN):
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in {"", "."}:
            raise ImageRefusedError(f"The image has a whiteout of nothing: {name[:200]}")
        tree.white_out(parent + hidden)
