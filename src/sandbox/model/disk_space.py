"""How much must be free on the file system of the data directory before something is held back."""

import errno

import msgspec

from sandbox.model.limits import WATERMARK_LIFT_FACTOR


class Space(msgspec.Struct, frozen=True):
    """What is free on a file system, for who is not root. Where files are not counted, `files_total` is 0."""

    free_bytes: int
    total_bytes: int
    files_free: int = 0
    files_total: int = 0
    is_read_only: bool = False

    def without(self, kept_bytes: int) -> "Space":
        """The same with so much less free."""
        return msgspec.structs.replace(self, free_bytes=self.free_bytes - kept_bytes)


class Watermark(msgspec.Struct, frozen=True):
    """A share of the file system, but no more than so many bytes: a small disk keeps a little, a large one no waste.

    Of the files that can be made the same share is kept free.
    """

    percent: float
    bytes_max: int

    def bytes_of(self, space: Space) -> int:
        """What must be free there."""
        return min(int(space.total_bytes * self.percent / 100), self.bytes_max)

    def is_short(self, space: Space, *, was_short: bool) -> bool:
        """Whether too little is free. What was held back goes on when there is clearly more, so that nothing flaps."""
        factor = WATERMARK_LIFT_FACTOR if was_short else 1.0
        files_min = space.files_total * self.percent / 100
        return space.free_bytes < factor * self.bytes_of(space) or space.files_free < factor * files_min


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_PASSES = NO_ROOM | {errno.EIO}


def refusal_of(error: Exception) -> OSError | None:
    """The refusal of a disk that is behind an error, if one is: another try may go well."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _PASSES:
            return cause
    return None
