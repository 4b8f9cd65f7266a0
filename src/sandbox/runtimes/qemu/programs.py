"""Copies that can be read, of programs that cannot: virtiofsd has the sandbox's uid and must read what it serves.

A program's content is no secret. That nothing inside can read it is seen to in the guest.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

_READABLE = 0o555


def split_programs(programs: Mapping[Path, str]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Those that everybody may read, and readable copies of the others. Raises OSError."""
    laid, hidden = {}, {}
    for path, inside in programs.items():
        if path.stat().st_mode & stat.S_IROTH:
            laid[path] = inside
        else:
            hidden[ensure_copy(path)] = inside
    return laid, hidden


def ensure_copy(path: Path) -> Path:
    """The copy beside it, made when there is none of this very file. Raises OSError."""
    found = path.stat()
    copy = path.with_name(f"{path.name}.readable-{found.st_size}-{found.st_mtime_ns}")
    if not copy.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".readable-", delete=False) as file:
            part = Path(file.name)
            try:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, file, 16 * 1024 * 1024)
                os.fchmod(file.fileno(), _READABLE)
                part.replace(copy)
            except BaseException:
                part.unlink()
                raise
    return copy
