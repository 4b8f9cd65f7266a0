"""Stores a profile's images, computes the digests of their files, and locks the images in use.

An image is a directory that is named after its digest and never changes. The file `current` names the profile's current
image. A process that uses an image holds a shared lock on its directory; removing the image requires an exclusive lock.
"""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from sandbox.images.limits import SYNC_TIMEOUT_SECONDS
from sandbox.interfaces.images import (
    IMAGE_LAYOUT_VERSION,
    Image,
    ImageUnusableError,
    ProfileBusyError,
    ProfileNotFoundError,
)
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.failure import AttemptError, FailureCode

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


def stream_tar(root: Path) -> Iterator[bytes]:
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


class ImageMetadata(
    msgspec.Struct,
    frozen=True,
    rename={
        "layout_version": "layout",
        "entry_count": "entries",
        "package_versions": "versions",
        "format_version": "version",
    },
):
    """Metadata of an image.

    digest: digest of the root file system. source: describes what the image was built from. package_versions:
    versions of packages and components, keyed by name. format_version: of the stored metadata.
    """

    profile: str
    digest: str
    created_at: datetime
    source: str
    size_bytes: int
    entry_count: int
    package_versions: Mapping[str, str] = {}
    minimum_tier: str = ""
    layout_version: int = IMAGE_LAYOUT_VERSION
    format_version: int = 1


_IMAGE_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BUILD_DIRECTORY = "part"
_SYNC = "/usr/bin/sync"
_LOCK_TRIES = 5
_LOCK_RETRY_SECONDS = 0.002


def profiles_root(data_dir: Path) -> Path:
    """Return the directory that contains one directory per profile."""
    return data_dir / "profiles"


class ImageStore:
    """Stores the images of one profile. The profile's name must be valid."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self.name = name
        self._root = profiles_root(data_dir) / name

    def rootfs_path(self, digest: str) -> Path:
        """Return the directory that becomes the / of a sandbox."""
        return self._image_directory(digest) / "root"

    def read_current(self) -> ImageMetadata | None:
        """Return the metadata of the current image; None if there is no image or no such profile.

        Raises ImageUnusableError if the image is damaged or cannot be read.
        """
        name = self._current_name()
        if name is None:
            return None
        if not _IMAGE_NAME.fullmatch(name):
            raise self._unusable_error("is damaged")
        return self.read(f"sha256:{name}")

    def read(self, digest: str) -> ImageMetadata:
        """Return the metadata of an image. Raises ImageUnusableError if it is missing, damaged or cannot be read."""
        try:
            content = (self._image_directory(digest) / "record.json").read_bytes()
            metadata = msgspec.json.decode(content, type=ImageMetadata)
        except (OSError, *DECODE_ERRORS) as error:
            raise self._unusable_error(f"cannot be read: {error}") from error
        if metadata.digest != digest or not self.rootfs_path(digest).is_dir():
            raise self._unusable_error("is damaged")
        return metadata

    @contextmanager
    def build_directory(self) -> Iterator[Path]:
        """Yield a private directory for building an image. It is removed at the end of the block.

        On entry, removes the remains of killed builds, and images that are neither current nor locked. Images are not
        removed as soon as they are replaced, because a task may just have resolved its profile to one of them. Raises
        ProfileBusyError.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            self._prune()
            part = self._root / _BUILD_DIRECTORY
            part.mkdir(mode=0o700)
            try:
                yield part
            finally:
                shutil.rmtree(part, ignore_errors=True)

    def remove_stale_build(self) -> None:
        """Remove the remains of a killed build. Does nothing during a build."""
        if not (self._root / _BUILD_DIRECTORY).exists():
            return
        # Another process may remove the same build, or the whole profile.
        with suppress(ProfileBusyError, FileNotFoundError), self._locked():
            shutil.rmtree(self._root / _BUILD_DIRECTORY)

    def install(self, build_directory: Path, metadata: ImageMetadata) -> ImageMetadata:
        """Rename the built image to its final name and make it current. Returns its final metadata.

        A damaged image with the same digest is replaced. Raises ProfileBusyError if a task uses that image.
        """
        final = self._image_directory(metadata.digest)
        metadata = msgspec.structs.replace(metadata, created_at=_existing_created_at(final) or metadata.created_at)
        metadata_file = build_directory / "record.json"
        metadata_file.write_bytes(msgspec.json.format(msgspec.json.encode(metadata)))
        if _is_intact(final / "root", metadata.digest):
            _sync_file_system(metadata_file)
            metadata_file.rename(final / "record.json")
        else:
            new_directory = build_directory / "made"
            new_directory.mkdir(mode=0o700)
            (build_directory / "root").rename(new_directory / "root")
            metadata_file.rename(new_directory / "record.json")
            _sync_file_system(new_directory)
            self._replace(final, new_directory, build_directory / "before")
        pointer = build_directory / "current"
        pointer.write_text(f"{final.name}\n")
        _sync_file_system(pointer)
        pointer.rename(self._root / "current")
        _sync_file_system(self._root)
        return metadata

    def _replace(self, final: Path, built: Path, backup: Path) -> None:
        """Replace an image. An interruption between the two renames leaves no image until the next build."""
        if final.exists():
            with _try_lock(final, fcntl.LOCK_EX) as is_free:
                if not is_free:
                    raise ProfileBusyError(
                        f"The image of {self.name} is damaged and a task uses it; wait for the task to end, or cancel "
                        "it, then build the image again."
                    )
                final.rename(backup)
        built.rename(final)

    def remove_images(self) -> None:
        """Remove all images. Raises ProfileNotFoundError, ProfileBusyError; in both cases nothing was removed."""
        if not self._root.is_dir():
            raise ProfileNotFoundError(f"The profile {self.name} has no image here.")
        with self._locked(), ExitStack() as locks:
            images = list(self._images())
            for image in images:
                if not locks.enter_context(_try_lock(image, fcntl.LOCK_EX)):
                    raise ProfileBusyError(
                        f"A task uses the image of {self.name}; wait for the task to end, or cancel it."
                    )
            (self._root / "current").unlink(missing_ok=True)
            _sync_file_system(self._root)
            shutil.rmtree(self._root)

    def lock_image(self, digest: str) -> int:
        """Return a descriptor that prevents the image's removal while it is open. Raises ImageUnusableError.

        Retries briefly, because an attempt to remove the image locks it for a moment.
        """
        image = self._image_directory(digest)
        for _ in range(_LOCK_TRIES):
            with suppress(OSError):
                return _lock_shared(image)
            time.sleep(_LOCK_RETRY_SECONDS)
        raise self._unusable_error("is being removed" if image.exists() else "is gone")

    def _image_directory(self, digest: str) -> Path:
        """Return the directory of an image. Raises ImageUnusableError if this is not a digest, such as `../x`."""
        name = digest.removeprefix("sha256:")
        if not _IMAGE_NAME.fullmatch(name):
            raise self._unusable_error("has an invalid digest")
        return self._root / name

    def _current_name(self) -> str | None:
        """Return the content of `current`; None if it does not exist. Raises ImageUnusableError."""
        try:
            return (self._root / "current").read_text(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unusable_error(f"cannot be read: {error}") from error

    def _images(self) -> Iterator[Path]:
        yield from (path for path in self._root.iterdir() if _IMAGE_NAME.fullmatch(path.name))

    def _prune(self) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._root / _BUILD_DIRECTORY)
        try:
            current = self._current_name()
        except ImageUnusableError:
            return  # any of the images may be the current one
        for image in [image for image in self._images() if image.name != current]:
            with _try_lock(image, fcntl.LOCK_EX) as is_free:
                if is_free:
                    image.rename(self._root / _BUILD_DIRECTORY)
                    shutil.rmtree(self._root / _BUILD_DIRECTORY)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _try_lock(self._root, fcntl.LOCK_EX) as is_free:
            if not is_free:
                raise ProfileBusyError(f"An image of {self.name} is being built or removed; wait until it is done.")
            yield

    def _unusable_error(self, reason: str) -> ImageUnusableError:
        remedy = f"build it again (sandbox profile build {self.name}) or remove it (sandbox profile remove {self.name})"
        return ImageUnusableError(f"The image of the profile {self.name} {reason}; {remedy}.")


@contextmanager
def _try_lock(directory: Path, operation: int) -> Iterator[bool]:
    """Try to lock a directory for the duration of the block, without waiting. Yields whether this succeeded."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _lock_shared(image: Path) -> int:
    """Open and lock the image. Raises OSError if it is being removed or was just removed."""
    descriptor = os.open(image, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), image.stat()):
            raise FileNotFoundError(image)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _existing_created_at(image: Path) -> datetime | None:
    try:
        return msgspec.json.decode((image / "record.json").read_bytes(), type=ImageMetadata).created_at
    except (OSError, *DECODE_ERRORS):
        return None


def _is_intact(rootfs: Path, digest: str) -> bool:
    try:
        return compute_digest(rootfs).digest == digest
    except OSError:
        return False


def _sync_file_system(path: Path) -> None:
    """Flush the file system that contains `path`.

    A tree has too many files to flush each one separately. Raises OSError.
    """
    try:
        subprocess.run([_SYNC, "-f", "--", str(path)], timeout=SYNC_TIMEOUT_SECONDS, check=True, env={})
    except subprocess.SubprocessError as error:
        raise OSError(f"The disk could not be flushed; check the machine's log, and try again: {error}") from error


class ImageLocks:
    """Implements `interfaces.images.ImageLocks`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def acquire(self, image: Image) -> None:
        """Lock the image until the process ends. Implements `ImageLocks.acquire`."""
        try:
            ImageStore(self._data_dir, image.profile).lock_image(image.digest)
        except ImageUnusableError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, error.message) from error
