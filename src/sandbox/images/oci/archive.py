"""Reads the archive of an OCI image: a plain tar whose members are accessed by name."""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import msgspec

from sandbox.images.errors import ImageRefusedError
from sandbox.images.limits import ARCHIVE_MEMBERS_MAX, IMAGE_METADATA_BYTES_MAX, IMAGE_PATH_BYTES_MAX
from sandbox.images.oci.layer import check_global_headers, converting_tar_errors
from sandbox.images.oci.limited_streams import HeaderLimitedFile
from sandbox.model.errors import DECODE_ERRORS

DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_CHUNK_BYTES = 1024 * 1024
_T = TypeVar("_T")


class OciArchive:
    """An open archive. Members are read on request. Their names are never used as host paths."""

    def __init__(self, tar: tarfile.TarFile, file: HeaderLimitedFile) -> None:
        self._tar = tar
        self._members: dict[str, tarfile.TarInfo] = {}
        count = 0
        while (member := tar.next()) is not None:
            file.start_header()
            if member.size < 0:
                raise ImageRefusedError("The archive has a member of negative size.")
            check_global_headers(tar)
            if len(member.name) + len(member.linkname) > IMAGE_PATH_BYTES_MAX:
                raise ImageRefusedError(f"The archive contains a name that is too long: {member.name[:200]}")
            # All members stay in memory, so remove the pax headers, which tarfile has already applied.
            cast("Any", member).pax_headers = {}
            self._members[member.name.removeprefix("./")] = member
            count += 1
            if count > ARCHIVE_MEMBERS_MAX:
                raise ImageRefusedError(f"The archive has more than {ARCHIVE_MEMBERS_MAX} members.")
        file.end_header()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str, digest: str = "") -> BinaryIO:
        """Return a member's content, after verifying the digest if one is given. Raises ImageRefusedError."""
        file: Any = self._tar.extractfile(self._find(name))
        if digest:
            self._verify(name, file, digest)
            file.seek(0)
        return cast("BinaryIO", file)

    def decode(self, name: str, kind: type[_T], digest: str = "") -> _T:
        """Decode a JSON member. Raises ImageRefusedError."""
        if self._find(name).size > IMAGE_METADATA_BYTES_MAX:
            raise ImageRefusedError(
                f"{name[:200]} in the archive is larger than {IMAGE_METADATA_BYTES_MAX // 1024**2} MiB."
            )
        try:
            return msgspec.json.decode(self.open(name, digest).read(), type=kind)
        except DECODE_ERRORS as error:
            raise ImageRefusedError(f"{name[:200]} in the archive is malformed: {error}.") from error

    def _find(self, name: str) -> tarfile.TarInfo:
        member = self._members.get(name)
        if member is not None and member.issym():
            # `docker save` writes each layer once and then links to it, as in ../<id>/layer.tar.
            member = self._members.get(member.linkname.removeprefix("../"))
        if member is None or not member.isreg() or member.issparse():
            raise ImageRefusedError(f"The archive lacks the file {name[:200]}.")
        return member

    def _verify(self, name: str, file: BinaryIO, digest: str) -> None:
        hashed = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
        if digest != f"sha256:{hashed.hexdigest()}":
            raise ImageRefusedError(f"{name[:200]} in the archive does not match its digest.")


@contextmanager
def open_archive(path: Path) -> Iterator[OciArchive]:
    """Open an archive. Raises OSError or ImageRefusedError, even for errors while the block reads the archive."""
    with converting_tar_errors(), path.open("rb") as file:
        if not _is_uncompressed_tar(file):
            raise ImageRefusedError(
                f"{path} is not an uncompressed tar; uncompress it first, or save it as oci-archive."
            )
        limited_file = HeaderLimitedFile(file)
        with tarfile.open(fileobj=cast("IO[bytes]", limited_file), mode="r:") as tar:
            yield OciArchive(tar, limited_file)


def _is_uncompressed_tar(file: BinaryIO) -> bool:
    """Check the format before `tarfile` opens the archive, because `tarfile` would read a header of unlimited size."""
    file.seek(257)
    magic = file.read(5)
    file.seek(0)
    return magic == b"ustar"
