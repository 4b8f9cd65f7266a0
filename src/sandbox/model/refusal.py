"""What a disk says when it takes nothing at the moment."""

import errno

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_PASSES = NO_ROOM | {errno.EIO}


def refusal_of(error: Exception) -> OSError | None:
    """The refusal of a disk that is behind an error, if one is: another try may go well."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _PASSES:
            return cause
    return None
