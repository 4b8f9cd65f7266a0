"""Directories whose entries must be on disk before anybody is told of them."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Bring a directory's entries, or a file's content, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
