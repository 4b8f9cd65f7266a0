"""Names that git keeps out of its trees, so no patch can carry them."""

import re

_GIT_DIRECTORY = re.compile(rb"(\.git|git~1)[ .]*([:\\].*)?", re.IGNORECASE | re.DOTALL)
_MODULES_FILE = re.compile(
    rb"(\.gitmodules|gitmod~[1-4]|gi7eb[0-9a-f]~[0-9])[ .]*([:\\].*)?", re.IGNORECASE | re.DOTALL
)


def is_refused(name: bytes, *, is_link: bool) -> bool:
    """`.git` in every spelling that some file system takes for it, and `.gitmodules` as a symbolic link."""
    if _GIT_DIRECTORY.fullmatch(name):
        return True
    return is_link and _MODULES_FILE.fullmatch(name) is not None
