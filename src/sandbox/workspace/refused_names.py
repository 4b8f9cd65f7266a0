r"""Names that git keeps out of its trees, so no patch can carry them: one alone makes `git apply` refuse all of it.

As in git's `verify_path`, for what NTFS and HFS+ take for `.git`, and for `.gitmodules` where that is a symbolic link.
Git looks behind a backslash too, and knows NTFS's short names, also those made of a hash (`gi7eba~1`, `~1234567`).
"""

import re

_HASHED = "gi7eba"
_SHORT = "|".join(f"{_HASHED[:length]}~[1-9][0-9]{{{6 - length}}}" for length in range(len(_HASHED) + 1))
_NTFS_GIT = re.compile(rb"(?:^|/|[^/]\\)(?:\.git|git~1)[ .]*(?:[:/\\]|\Z)", re.IGNORECASE)
_NTFS_MODULES = re.compile(
    rf"(?:^|/|[^/]\\)(?:\.gitmodules|gitmod~[1-4]|{_SHORT})[ .]*(?::|\Z)".encode(), re.IGNORECASE
)
# A byte that is no UTF-8 is the end of a name to git here.
_HFS_GIT = re.compile(r"(?:^|/)\.git(?:[/\udc80-\udcff]|\Z)", re.IGNORECASE | re.ASCII)
_HFS_MODULES = re.compile(r"(?:^|/)\.gitmodules(?:[/\udc80-\udcff]|\Z)", re.IGNORECASE | re.ASCII)
_UNSEEN_BY_HFS = re.compile(r"[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")


def is_refused(path: bytes, *, is_link: bool) -> bool:
    """Whether git takes no such path, here or on the machine where a patch is applied."""
    seen = _UNSEEN_BY_HFS.sub("", path.decode(errors="surrogateescape"))
    if _NTFS_GIT.search(path) or _HFS_GIT.search(seen):
        return True
    return is_link and bool(_NTFS_MODULES.search(path) or _HFS_MODULES.search(seen))
