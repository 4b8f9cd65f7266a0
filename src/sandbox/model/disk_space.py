"""How much must be free on the file system of the data directory before something is held back."""

import errno

import msgspec

from sandbox.model.limits import WATERMARK_HYSTERESIS_FACTOR


class DiskSpace(msgspec.Struct, frozen=True):
    """What is free on a file system, for who is not root. Where files are not counted, `files_total` is 0."""

    free_bytes: int
    total_bytes: int
    files_free: int = 0
    files_total: int = 0
    is_read_only: bool = False

    def minus_reserve(self, reserved_bytes: int) -> "DiskSpace":
        """The same with so much less free."""
        return msgspec.structs.replace(self, free_bytes=self.free_bytes - reserved_bytes)


class Watermark(msgspec.Struct, frozen=True):
    """A share of the file system, but no more than so many bytes: a small disk keeps a little, a large one no waste.

    Of the files that can be made the same share is kept free.
    """

    percent: float
    bytes_max: int

    def threshold_bytes(self, space: DiskSpace) -> int:
        """What must be free there."""
        return min(int(space.total_bytes * self.percent / 100), self.bytes_max)

    def is_low(self, space: DiskSpace, *, was_low: bool) -> bool:
        """Whether too little is free. What was held back goes on when there is clearly more, so that nothing flaps."""
        factor = WATERMARK_HYSTERESIS_FACTOR if was_low else 1.0
        files_min = space.files_total * self.percent / 100
        return space.free_bytes < factor * self.threshold_bytes(space) or space.files_free < factor * files_min


DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT_ERRNOS = DISK_FULL_ERRNOS | {errno.EIO}


def transient_disk_error(error: Exception) -> OSError | None:
    """The refusal of a disk that is behind an error, if one is: another try may go well."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNOS:
            return cause
    return None
