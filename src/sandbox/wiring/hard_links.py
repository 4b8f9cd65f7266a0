"""Second names of files, which some disks do not have: FAT, some of a network."""

import errno
import os
from pathlib import Path

_HAS_NONE = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def try_link(file: Path, name: Path) -> bool:
    """Give a file a second name; False where its disk has no hard links. Raises OSError."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in _HAS_NONE:
            raise
        return False
    return True
