"""Copies an artifact that a worker sends in chunks."""

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from sandbox.model.artifacts import Artifact
from sandbox.primitives.durable_files import fsync_path
from sandbox.primitives.file_permissions import create_private_file


class ReceivedArtifactFile:
    """Implements `interfaces.journal.ArtifactCopy`. A `close` in another thread waits for the call that is running."""

    def __init__(self, artifact: Artifact, partial: Path, target: Path, on_close: Callable[[], None]) -> None:
        self._artifact = artifact
        self._partial = partial
        self._target = target
        self._on_close = on_close
        self._lock = threading.Lock()
        self._digest, self._size_bytes = hashlib.sha256(), 0
        self._is_published = False
        self._file = create_private_file(partial)

    def write(self, data: bytes) -> None:
        """Implements `ArtifactCopy.write`."""
        with self._lock:
            self._check_open()
            self._digest.update(data)
            self._size_bytes += len(data)
            self._file.write(data)

    def flush(self) -> None:
        """Implements `ArtifactCopy.flush`."""
        with self._lock:
            self._check_open()
            content = self._size_bytes, f"sha256:{self._digest.hexdigest()}"
            if content != (self._artifact.size_bytes, self._artifact.checksum):
                raise OSError(errno.EIO, "An artifact differs from its record", self._artifact.name)
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Implements `ArtifactCopy.publish`."""
        self._partial.rename(self._target)
        self._is_published = True

    def close(self) -> None:
        """Implements `ArtifactCopy.close`."""
        with self._lock:
            if self._file.closed:
                return
            try:
                with contextlib.suppress(OSError):  # what was not flushed is removed
                    self._file.close()
                if self._is_published:
                    fsync_path(self._target.parent)
                else:
                    self._partial.unlink(missing_ok=True)
            finally:
                self._on_close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise OSError(errno.EBADF, "The artifact is closed", self._artifact.name)


def partial_name(number: str) -> str:
    """Return the name of a file that is being received. number: distinguishes files of one task."""
    return f"artifact-{number}.part"
