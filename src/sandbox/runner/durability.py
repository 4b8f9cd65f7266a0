"""Files that are on disk, their names included, before anybody hears of them."""

import os
from pathlib import Path


def give_name(part: Path, target: Path) -> None:
    """Flush a file that is written and move it to its name, in place of whatever has it. Raises OSError."""
    flush(part)
    part.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
