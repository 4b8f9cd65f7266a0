"""Writes an image's files without ever leaving the image's directory.

The files may come from hostile archives. Paths are resolved from the image's root, link by link as in the sandbox, so a
link to /etc refers to the image's own /etc. No other process may write to the directory at the same time.
"""

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sandbox.images.limits import (
    FOLLOWED_LINKS_MAX,
    IMAGE_BYTES_MAX,
    IMAGE_DEPTH_MAX,
    IMAGE_ENTRIES_MAX,
    IMAGE_PATH_BYTES_MAX,
)
from sandbox.interfaces.images import ImageRefusedError

_CHUNK_BYTES = 1024 * 1024
_PATH_ERRNOS = (errno.EILSEQ, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)
_NAME_BYTES_MAX = 255  # the limit in common file systems


class RootFsWriter:
    """A root file system under construction. Its files are readable by everybody and belong to this process's user."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bytes = 0
        self._entries = 0
        self._whiteout_entries = 0
        self._added_in_layer: set[int] = set()
        """Hashes of the added paths. The paths themselves could take up several gigabytes."""

    def start_layer(self) -> None:
        """Start a layer. Its whiteouts do not apply to files of the same layer."""
        self._added_in_layer.clear()

    def add_directory(self, name: str) -> None:
        """Create a directory or keep an existing one. Raises ImageRefusedError."""
        parts = split_path(name)
        if not parts:
            return
        path = self._prepare_path(parts)
        if not _is_directory(path):
            _remove(path)
            _make_directory(path)

    def add_file(self, name: str, content: BinaryIO, size: int, *, is_executable: bool, mtime: float) -> None:
        """Write a file of `size` bytes, replacing what exists. Raises ImageRefusedError."""
        self._count_bytes(size)
        path = self._make_vacant(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in _chunks(content, size):
                file.write(chunk)
            file.flush()
            os.fchmod(descriptor, 0o755 if is_executable else 0o644)
            seconds = min(max(int(mtime), 0), 2**33)
            os.utime(descriptor, (seconds, seconds))

    def add_link(self, name: str, target: str) -> None:
        """Create a symbolic link with any target, because links are only ever resolved within the image.

        Raises ImageRefusedError.
        """
        if not target or "\0" in target or len(os.fsencode(target)) > IMAGE_PATH_BYTES_MAX:
            raise ImageRefusedError(f"The image has a link without a valid target: {name[:200]}")
        os.symlink(target, self._make_vacant(name))  # noqa: PTH211

    def add_hard_link(self, name: str, target: str) -> None:
        """Create a hard link to a file of the tree. Raises ImageRefusedError if there is no such file.

        The file's size counts once per link, because reading the whole tree reads the file once per link.
        """
        source = self.find(target)
        status = None if source is None else os.lstat(source)
        if source is None or status is None or not stat.S_ISREG(status.st_mode):
            raise ImageRefusedError(f"The target of a hard link is not a regular file of the image: {target[:200]}")
        self._count_bytes(status.st_size)
        path = self._make_vacant(name)
        if not os.path.lexists(source):
            raise ImageRefusedError(f"The image has a hard link to itself: {name[:200]}")
        os.link(source, path, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove the file or directory with this name. Raises ImageRefusedError."""
        path = self.find(name)
        if path is not None and path != str(self.root):
            _remove(path)

    def apply_whiteout(self, name: str) -> None:
        """Remove the entry with this name if an earlier layer created it. Raises ImageRefusedError."""
        self._count_entry()
        path = self.find(name)
        if path is not None and path != str(self.root):
            self._remove_earlier(path)

    def apply_opaque_whiteout(self, name: str) -> None:
        """Remove the entries in this directory that earlier layers created. Raises ImageRefusedError."""
        self._count_entry()
        path = self.find(name)
        if path is not None and _is_directory(path):
            self._remove_earlier_content(path)

    def find(self, name: str) -> str | None:
        """Return the host path of a name, following links in its parents only; None if the path does not exist."""
        parts = split_path(name)
        if not parts:
            return str(self.root)
        try:
            parent = self._walk(parts[:-1], creates_missing=False)
        except OSError:
            return None
        path = os.path.join(parent, parts[-1])  # noqa: PTH118
        return path if os.path.lexists(path) else None

    def resolve(self, name: str) -> str | None:
        """Resolve a name as `find` does, but also follow a link at the end of the path, as the sandbox does."""
        for _ in range(FOLLOWED_LINKS_MAX):
            path = self.find(name)
            if path is None or not os.path.islink(path):  # noqa: PTH114
                return path
            target = os.readlink(path)  # noqa: PTH115
            relative = os.path.relpath(os.path.dirname(path), self.root)  # noqa: PTH120
            name = target if target.startswith("/") else f"/{relative}/{target}"
            name = os.path.normpath(name)
        return None

    def _make_vacant(self, name: str) -> str:
        parts = split_path(name)
        if not parts:
            raise ImageRefusedError("The root of the image is not a directory.")
        path = self._prepare_path(parts)
        _remove(path)
        return path

    def _prepare_path(self, parts: Sequence[str]) -> str:
        self._count_entry()
        try:
            path = os.path.join(self._walk(parts[:-1], creates_missing=True), parts[-1])  # noqa: PTH118
        except OSError as error:
            if error.errno not in _PATH_ERRNOS:
                raise  # the disk is the cause, not the image
            raise ImageRefusedError(f"The image has an invalid path: {error.strerror}.") from error
        self._mark_added(path)
        return path

    def _walk(self, parts: Sequence[str], *, creates_missing: bool) -> str:
        """Return the host path of a directory, without links. Raises ImageRefusedError, FileNotFoundError."""
        pending, resolved, links = deque(parts), [str(self.root)], 0
        while pending:
            segment = pending.popleft()
            if segment in {"", "."}:
                continue
            if segment == "..":
                resolved = resolved[: max(len(resolved) - 1, 1)]
                continue
            path = "/".join((*resolved, segment))
            mode = self._mode_or_create(path, creates_missing=creates_missing)
            if stat.S_ISLNK(mode):
                links += 1
                target = os.readlink(path)  # noqa: PTH115
                resolved = resolved[:1] if target.startswith("/") else resolved
                pending.extendleft(reversed(target.split("/")))
            elif stat.S_ISDIR(mode):
                resolved.append(segment)
            if len(resolved) > IMAGE_DEPTH_MAX:
                raise ImageRefusedError(f"The image has directories nested more than {IMAGE_DEPTH_MAX} levels deep.")
            if links > FOLLOWED_LINKS_MAX or not (stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
                raise ImageRefusedError(
                    f"The image has a path through a file that is not a directory: {'/'.join(parts)[:200]}"
                )
        return "/".join(resolved)

    def _mode_or_create(self, path: str, *, creates_missing: bool) -> int:
        try:
            return os.lstat(path).st_mode
        except FileNotFoundError:
            if not creates_missing:
                raise
        self._count_entry()
        _make_directory(path)
        self._mark_added(path)
        return stat.S_IFDIR

    def _mark_added(self, path: str) -> None:
        root = str(self.root)
        while path != root and hash(path) not in self._added_in_layer:
            self._added_in_layer.add(hash(path))
            path = os.path.dirname(path)  # noqa: PTH120

    def _remove_earlier(self, path: str) -> None:
        if hash(path) not in self._added_in_layer:
            _remove(path)
        elif _is_directory(path):
            self._remove_earlier_content(path)

    def _remove_earlier_content(self, path: str) -> None:
        names = os.listdir(path)  # noqa: PTH208
        self._whiteout_entries += len(names)
        if self._whiteout_entries > IMAGE_ENTRIES_MAX:
            raise ImageRefusedError(f"The image's whiteouts cover more than {IMAGE_ENTRIES_MAX} files.")
        for name in names:
            self._remove_earlier(f"{path}/{name}")

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > IMAGE_ENTRIES_MAX:
            raise ImageRefusedError(f"The image has more than {IMAGE_ENTRIES_MAX} files.")

    def _count_bytes(self, size: int) -> None:
        self._bytes += size
        if size < 0 or self._bytes > IMAGE_BYTES_MAX:
            raise ImageRefusedError(f"The image is larger than {IMAGE_BYTES_MAX // 1024**3} GiB.")


def split_path(name: str) -> list[str]:
    """Split a path in the image, ignoring a leading slash. Raises ImageRefusedError if it could leave the tree."""
    if "\0" in name or len(os.fsencode(name)) > IMAGE_PATH_BYTES_MAX:
        raise ImageRefusedError(f"The image has a path that is too long or invalid: {name[:200]!r}")
    parts = [segment for segment in name.split("/") if segment not in {"", "."}]
    if any(len(os.fsencode(part)) > _NAME_BYTES_MAX for part in parts):
        raise ImageRefusedError(f"The image contains a name that is too long: {name[:200]!r}")
    if ".." in parts:
        raise ImageRefusedError(f"The image has a path that leads out of it: {name[:200]}")
    return parts


def _chunks(content: BinaryIO, size: int) -> Iterator[bytes]:
    remaining = size
    while remaining:
        chunk = content.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise ImageRefusedError("The image is truncated.")
        remaining -= len(chunk)
        yield chunk


def _make_directory(path: str) -> None:
    os.mkdir(path)  # noqa: PTH102
    os.chmod(path, 0o755)  # noqa: PTH101, S103  (regardless of the umask)


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
