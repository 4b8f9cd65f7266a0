"""Copies images from the server to other hosts. The other host computes the digest and rejects a copy that differs."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from sandbox.images.image_builder import create_rootfs
from sandbox.images.image_store import CHUNK_BYTES, ImageMetadata, ImageStore, compute_digest, stream_tar
from sandbox.images.limits import IMAGE_BYTES_MAX, IMAGE_ENTRIES_MAX
from sandbox.images.profiles import ProfileCatalog
from sandbox.images.tar_layers import ByteBudget, TarStream, apply_layer
from sandbox.interfaces.images import (
    IMAGE_LAYOUT_VERSION,
    Image,
    ImageReceptionBusyError,
    ImageReference,
    ImageRefusedError,
    ImageUnusableError,
    ProfileBusyError,
)
from sandbox.interfaces.runtime import TIERS, is_strong_enough
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import OUTPUT_FREE_BYTES

RECEIVED_IMAGE_SOURCE = "the server"
"""The source of an image that this host got from a server."""

_PART_BYTES = CHUNK_BYTES
_ENTRY_OVERHEAD_BYTES = 2048
"""Size of the header and the padding of an entry with a short path."""


class StoredImageContent:
    """Implements `interfaces.images.ImageContent` for a stored image."""

    def __init__(self, root: Path, lock_fd: int) -> None:
        self._chunks: Iterator[bytes] = stream_tar(root)
        self._rest = BytesIO()
        self._lock_fd: int | None = lock_fd

    def read(self) -> bytes:
        """Implements `ImageContent.read`."""
        part = bytearray()
        while len(part) < _PART_BYTES:
            if not (data := self._rest.read(_PART_BYTES - len(part))):
                if (chunk := next(self._chunks, None)) is None:
                    break
                self._rest = BytesIO(chunk)
            part += data
        return bytes(part)

    def close(self) -> None:
        """Implements `ImageContent.close`."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


class ServerImageSource(ProfileCatalog):
    """Implements `interfaces.images.ImageSource`: the images of a data directory."""

    def find_reference(self, profile: str) -> ImageReference | None:
        """Implements `ImageSource.find_reference`. The host that receives a copy checks its minimum tier."""
        image = self.find_image(profile, TIERS[-1])
        if image is None:
            return None
        metadata = self.image_store(profile).read(image.digest)
        return ImageReference(profile, image.digest, metadata.size_bytes, metadata.minimum_tier)

    def open(self, image: ImageReference) -> StoredImageContent:
        """Implements `ImageSource.open`."""
        store = self.image_store(image.profile)
        return StoredImageContent(store.rootfs_path(image.digest), store.lock_image(image.digest))


class HostImageCopies:
    """Implements `interfaces.images.ImageCopies`: the copies in the data directory of a host's workers.

    The workers of a host share the copies. A copy that no worker uses is removed when a newer one of the same profile
    arrives.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._catalog = ProfileCatalog(data_dir)
        self._locks: dict[str, int] = {}
        """The descriptors that protect copies from removal, keyed by digest."""
        self._finding = threading.Lock()

    def find(self, image: ImageReference, tier: str) -> Image | None:
        """Implements `ImageCopies.find`."""
        if not is_strong_enough(tier, image.minimum_tier):
            raise ImageUnusableError(
                f"The profile {image.profile} requires a runtime of tier {image.minimum_tier} or stronger; this "
                f"host's runtime has tier {tier}."
            )
        store = self._catalog.image_store(image.profile)
        with self._finding:
            try:
                self._lock(store, image.digest)
                metadata = store.read(image.digest)
            except ImageUnusableError:
                self._unlock(image.digest)
                return None
            if metadata.layout_version != IMAGE_LAYOUT_VERSION:
                self._unlock(image.digest)
                return None
        return Image(image.profile, image.digest, str(store.rootfs_path(image.digest)))

    def _lock(self, store: ImageStore, digest: str) -> None:
        """Lock the directory that now has the image's name, because an earlier one may have been replaced.

        Raises ImageUnusableError.
        """
        lock_fd = store.lock_image(digest)
        self._unlock(digest)
        self._locks[digest] = lock_fd

    def _unlock(self, digest: str) -> None:
        if (lock_fd := self._locks.pop(digest, None)) is not None:
            os.close(lock_fd)

    def check_no_own_image(self, profile: str) -> None:
        """Implements `ImageCopies.check_no_own_image`."""
        try:
            own = self._catalog.image_store(profile).read_current()
            if own is None or own.source == RECEIVED_IMAGE_SOURCE:
                return
            found = f"{profile}@{own.digest}"
        except ImageUnusableError as error:
            found = error.message.removesuffix(".")
        raise ImageUnusableError(
            f"The server has no image of the profile {profile}, but this host has one ({found}). Build or import the "
            f"image on the server, which sends it to all hosts, or remove it here: sandbox profile remove {profile} "
            f"--data-dir {self._data_dir}"
        )

    def receive(self, image: ImageReference, read: Callable[[], bytes]) -> None:
        """Implements `ImageCopies.receive`."""
        store = self._catalog.image_store(image.profile)
        try:
            with store.build_directory() as part:
                self._receive(store, part, image, read)
        except ProfileBusyError as error:
            raise ImageReceptionBusyError(error.message) from error
        except ImageRefusedError as error:
            raise ImageUnusableError(
                f"The server's image {image.name} cannot be copied: {error_reason(error)} Build or import it again."
            ) from error

    def _receive(self, store: ImageStore, part: Path, image: ImageReference, read: Callable[[], bytes]) -> None:
        image_bytes = min(image.size_bytes, IMAGE_BYTES_MAX)
        _check_free_space(part, image_bytes)
        rootfs = create_rootfs(part)
        size_max = image_bytes + IMAGE_ENTRIES_MAX * _ENTRY_OVERHEAD_BYTES
        digest = apply_layer(TarStream(_PartReader(read), ByteBudget(size_max)), rootfs, has_whiteouts=False)
        if digest != image.digest:
            raise ImageRefusedError("Its content does not match its digest.")
        tree = compute_digest(rootfs.root)
        if tree.digest != digest:
            raise OSError(
                errno.EIO,
                f"The files of the image {image.name} that were written to {part.parent} differ from what the server "
                "sent; check the disk of this host",
            )
        store.install(
            part,
            ImageMetadata(
                profile=image.profile,
                digest=tree.digest,
                created_at=datetime.now(UTC).replace(microsecond=0),
                source=RECEIVED_IMAGE_SOURCE,
                size_bytes=tree.size_bytes,
                entry_count=tree.entry_count,
                minimum_tier=image.minimum_tier,
            ),
        )


def _check_free_space(directory: Path, image_bytes: int) -> None:
    """Check that an image of this size leaves enough space for the output of the tasks on this host. Raises OSError."""
    found = os.statvfs(directory)
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < image_bytes + OUTPUT_FREE_BYTES:
        needed, reserved, free = (f"{size / 1024**3:.1f} GiB" for size in (image_bytes, OUTPUT_FREE_BYTES, free_bytes))
        raise OSError(
            errno.ENOSPC,
            f"The image needs {needed}, and {reserved} must stay free, but {directory.parent} has {free} of free space",
        )


class _PartReader:
    """Implements `ByteSource` for content that arrives in parts."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read_part = read
        self._part = BytesIO()
        self._is_read = False

    def read(self, size: int, /) -> bytes:
        data = self._part.read(size)
        if not data and not self._is_read:
            content = self._read_part()
            self._is_read = not content
            self._part = BytesIO(content)
            data = self._part.read(size)
        return data
