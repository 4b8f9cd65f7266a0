"""Imports images made by other tools: OCI archives (`skopeo copy … oci-archive:`) and the output of `docker save`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sandbox.images.errors import ImageRefusedError
from sandbox.images.limits import IMAGE_BYTES_MAX, IMAGE_LAYERS_MAX
from sandbox.images.oci.archive import DIGEST, OciArchive, open_archive
from sandbox.images.oci.decompression import uncompressed
from sandbox.images.oci.layer import apply_layer
from sandbox.images.oci.limited_streams import ByteBudget, TarStream
from sandbox.images.rootfs_writer import RootFsWriter

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
