"""Imports images made by other tools: OCI archives (`skopeo copy … oci-archive:`) and the output of `docker save`.

Reads the archive, decompresses its layers (gzip, and zstd in a separate process) and applies them.
"""

import gzip
import hashlib
import os
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

import msgspec

from sandbox.images.limits import (
    ARCHIVE_MEMBERS_MAX,
    IMAGE_BYTES_MAX,
    IMAGE_LAYERS_MAX,
    IMAGE_METADATA_BYTES_MAX,
    IMAGE_PATH_BYTES_MAX,
)
from sandbox.images.rootfs_writer import RootFsWriter
from sandbox.images.tar_layers import (
    ByteBudget,
    ByteSource,
    HeaderLimitedFile,
    TarStream,
    apply_layer,
    check_global_headers,
    converting_tar_errors,
)
from sandbox.interfaces.images import ImageRefusedError
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


_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PROGRAM = "/usr/bin/zstd"
_MEMORY_LIMIT = "--memory=128MB"
_ADDRESS_SPACE_LIMIT = "--as=536870912"
"""Limits zstd's address space: zstd's own memory limit does not apply to some formats that it reads, such as xz."""

_LIMITER = ("/usr/bin/prlimit", _ADDRESS_SPACE_LIMIT, "--")
_EXIT_SECONDS = 30


@contextmanager
def uncompressed(blob: BinaryIO, scratch: Path) -> Iterator[ByteSource]:
    """Yield a stream of the uncompressed content. `blob`: seekable and at its start. Raises ImageRefusedError."""
    magic = blob.read(4)
    blob.seek(0)
    if magic.startswith(_GZIP):
        with converting_gzip_errors(), gzip.GzipFile(fileobj=blob, mode="rb") as file:
            yield cast("ByteSource", file)
    elif magic == _ZSTD:
        with _uncompressed_zstd(blob, scratch) as source:
            yield source
    else:
        yield blob


@contextmanager
def converting_gzip_errors() -> Iterator[None]:
    """Convert errors of damaged gzip data to ImageRefusedError."""
    try:
        yield
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ImageRefusedError(f"A layer of the image is damaged: {error}.") from error


@contextmanager
def _uncompressed_zstd(blob: BinaryIO, scratch: Path) -> Iterator[ByteSource]:
    """Uncompress a layer with the zstd program. Python has no zstd, and hostile data can harm only that process."""
    if not Path(_PROGRAM).exists():
        raise ImageRefusedError("A layer of the image is compressed with zstd; install zstd: apt-get install zstd")
    with tempfile.TemporaryFile(dir=scratch) as copy:
        while chunk := blob.read(_CHUNK_BYTES):
            copy.write(chunk)
        copy.seek(0)
        process = subprocess.Popen(
            [*_LIMITER, _PROGRAM, "-dc", _MEMORY_LIMIT],
            stdin=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ImageRefusedError("A layer of the image is damaged: zstd did not finish in time.") from error
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    if code != 0:
        raise ImageRefusedError("A layer of the image is damaged: zstd cannot read it.")


_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_INDEX_DEPTH_MAX = 4


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}):
    digest: str
    media_type: str = ""
    platform: _Platform | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor]


class _Manifest(msgspec.Struct, frozen=True):
    config: _Descriptor
    layers: list[_Descriptor]


class _RootFsConfig(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFsConfig
    architecture: str = ""


class _DockerManifest(msgspec.Struct, frozen=True, rename={"config": "Config", "layers": "Layers"}):
    config: str
    layers: list[str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer in the archive.

    digest: digest of its content; empty if unknown. diff_id: digest of the uncompressed tar.
    """

    name: str
    digest: str
    diff_id: str


def import_layers(path: Path, rootfs: RootFsWriter, scratch: Path) -> str:
    """Apply the layers of an archive. Returns the digest of the image's configuration.

    Every digest is verified. Raises ImageRefusedError, OSError.
    """
    with open_archive(path) as archive:
        digest, layers = _read_layers(archive)
        meter = ByteBudget(IMAGE_BYTES_MAX)
        for layer in layers:
            with uncompressed(archive.open(layer.name, layer.digest), scratch) as source:
                layer_digest = apply_layer(TarStream(source, meter), rootfs)
            if layer_digest != layer.diff_id:
                raise ImageRefusedError(f"The layer {layer.name[:200]} does not match its digest.")
        return digest


def _read_layers(archive: OciArchive) -> tuple[str, Sequence[_Layer]]:
    if "index.json" in archive:
        return _read_oci(archive)
    if "manifest.json" in archive:
        return _read_docker(archive)
    raise ImageRefusedError("The archive has neither index.json nor manifest.json, so it is not an image.")


def _read_oci(archive: OciArchive) -> tuple[str, Sequence[_Layer]]:
    manifest = archive.decode(*_find_manifest(archive, "index.json"))
    config = archive.decode(_blob_path(manifest.config.digest), _Config, manifest.config.digest)
    names = [_blob_path(layer.digest) for layer in manifest.layers]
    digests = [layer.digest for layer in manifest.layers]
    return manifest.config.digest, _build_layers(names, digests, config)


def _find_manifest(
    archive: OciArchive, name: str, digest: str = "", depth: int = 0
) -> tuple[str, type[_Manifest], str]:
    index = archive.decode(name, _Index, digest)
    matching = {one.digest: one for one in index.manifests if _matches_platform(one.platform)}
    if len(matching) != 1 or depth > _INDEX_DEPTH_MAX:
        kinds = "several images" if matching else f"no image for linux/{_architecture()}"
        raise ImageRefusedError(f"The archive contains {kinds}; save exactly one.")
    (chosen,) = matching.values()
    if chosen.media_type in _INDEXES:
        return _find_manifest(archive, _blob_path(chosen.digest), chosen.digest, depth + 1)
    return _blob_path(chosen.digest), _Manifest, chosen.digest


def _read_docker(archive: OciArchive) -> tuple[str, Sequence[_Layer]]:
    saved = archive.decode("manifest.json", list[_DockerManifest])
    if len(saved) != 1:
        raise ImageRefusedError("The archive contains several images; save exactly one.")
    (image,) = saved
    digest = f"sha256:{image.config.removesuffix('.json').rpartition('/')[2]}"
    if not DIGEST.fullmatch(digest):
        raise ImageRefusedError("The configuration in the archive is not named after its digest.")
    config = archive.decode(image.config, _Config, digest)
    return digest, _build_layers(image.layers, [""] * len(image.layers), config)


def _build_layers(names: Sequence[str], digests: Sequence[str], config: _Config) -> Sequence[_Layer]:
    diff_ids = config.rootfs.diff_ids
    if config.architecture not in {"", _architecture()}:
        raise ImageRefusedError(f"The image is for {config.architecture[:50]}, but this machine is {_architecture()}.")
    if not 0 < len(names) <= IMAGE_LAYERS_MAX or len(names) != len(diff_ids):
        raise ImageRefusedError(f"An image must have 1 to {IMAGE_LAYERS_MAX} layers, all listed in its configuration.")
    return [_Layer(*one) for one in zip(names, digests, diff_ids, strict=True)]


def _blob_path(digest: str) -> str:
    match = DIGEST.fullmatch(digest)
    if match is None:
        raise ImageRefusedError(f"The archive has a digest that is not sha256: {digest[:100]}")
    return f"blobs/sha256/{match[1]}"


def _matches_platform(platform: _Platform | None) -> bool:
    return platform is None or (platform.os in {"", "linux"} and platform.architecture in {"", _architecture()})


def _architecture() -> str:
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)
