"""Verified downloads: a file is created only after verification; pipes and devices receive only verified bytes."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from sandbox.client.errors import ArtifactTooLargeError, ChecksumError

READ_BYTES_MAX = 16 * 1024 * 1024
"""Default size limit of an artifact that is read into memory."""


class Download:
    """A download to `target`; a context manager that removes the partial file unless `finish` succeeded.

    A device or pipe cannot be replaced atomically, so it is written only after all bytes have been verified. Every
    method may raise OSError.

    checksum: hexadecimal SHA-256, with or without the `sha256:` prefix.
    """

    def __init__(self, target: Path, checksum: str) -> None:
        self._target = target
        self._checksum = ChecksumVerifier(checksum)
        self._temporary_path: Path | None = None
        self._size_bytes = 0

    def __enter__(self) -> Self:
        is_no_file = self._target.exists() and not self._target.is_file()
        # Omit the target's name: together with the random part, it could exceed the length limit of a file name.
        self._temporary_path = None if is_no_file else self._target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            self._file = self._temporary_path.open("xb") if self._temporary_path else TemporaryFile()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._target)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self._temporary_path is not None:
            self._temporary_path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Write the next bytes."""
        self._checksum.update(chunk)
        self._size_bytes += self._file.write(chunk)

    def finish(self) -> int:
        """Verify the file and move it to its target atomically; return its size in bytes.

        Raises ChecksumError.
        """
        self._checksum.verify(self._target.name)
        if self._temporary_path is None:
            self._file.seek(0)
            with self._target.open("wb") as file:
                shutil.copyfileobj(self._file, file)
        else:
            self._file.close()
            self._temporary_path.replace(self._target)
        return self._size_bytes


class MemoryDownload:
    """A download into memory, up to `bytes_max` bytes."""

    def __init__(self, name: str, checksum: str, bytes_max: int) -> None:
        self._name = name
        self._checksum = ChecksumVerifier(checksum)
        self._bytes_max = bytes_max
        self._data = bytearray()

    def write(self, chunk: bytes) -> None:
        """Add the next bytes. Raises ArtifactTooLargeError."""
        self._checksum.update(chunk)
        self._data += chunk
        if len(self._data) > self._bytes_max:
            message = f"{self._name} has more than {self._bytes_max} bytes. Download it into a file."
            raise ArtifactTooLargeError(message)

    def finish(self) -> bytes:
        """Return all bytes. Raises ChecksumError."""
        self._checksum.verify(self._name)
        return bytes(self._data)


class ChecksumVerifier:
    """Compares bytes with an expected SHA-256."""

    def __init__(self, expected: str) -> None:
        self._expected = expected.removeprefix("sha256:").lower()
        self._digest = hashlib.sha256()

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""
        self._digest.update(chunk)

    def verify(self, name: str) -> None:
        """Raise ChecksumError if the checksums differ."""
        if self._digest.hexdigest() != self._expected:
            raise ChecksumError(f"{name} was damaged in transit: its checksum differs. Nothing was saved; try again.")
