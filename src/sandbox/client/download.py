"""Bytes into a file that is either whole and verified, or not there."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path

from sandbox.client.errors import ChecksumError


def save(chunks: Iterable[bytes], checksum: str, target: Path) -> int:
    """Write `chunks` to `target` (replaced at once, at the end); give the number of bytes.

    checksum: the SHA-256 in hexadecimal, with or without `sha256:` before it.
    Raises ChecksumError, and leaves no file, when the bytes have another one; OSError as files do.
    """
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with part.open("xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size_bytes += file.write(chunk)
        if digest.hexdigest() != checksum.removeprefix("sha256:").lower():
            raise ChecksumError(f"{target.name} arrived damaged: its checksum is wrong. Nothing was kept; try again.")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return size_bytes
