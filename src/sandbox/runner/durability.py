"""Files that are on disk, their names included, before anybody hears of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def removing_unless_done(part: Path) -> Iterator[None]:
    """Where the block fails, what is there of the file goes: on a full disk others need its room until the next try."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
