"""Free-space thresholds of the data directory's file system."""

import errno

import msgspec

from sandbox.model.fixed_limits import WATERMARK_HYSTERESIS_FACTOR


class DiskSpace(msgspec.Struct, frozen=True):
    """Free and total space of a file system, as seen by a non-root user.

    `files_total` is 0 if the file system does not count files.
    """

    free_bytes: int
    total_bytes: int
    files_free: int = 0
    files_total: int = 0
    is_read_only: bool = False

    def minus_reserve(self, reserved_bytes: int) -> "DiskSpace":
        """Return a copy with `free_bytes` reduced by `reserved_bytes`."""
        return msgspec.structs.replace(self, free_bytes=self.free_bytes - reserved_bytes)


class Watermark(msgspec.Struct, frozen=True):
    """A minimum of free space: `percent` of the file system, but at most `bytes_max`.

    The same percentage applies to the number of files, without a cap.
    """

    percent: float
    bytes_max: int

    def threshold_bytes(self, space: DiskSpace) -> int:
        """Return how many bytes must be free."""
        return min(int(space.total_bytes * self.percent / 100), self.bytes_max)

    def is_low(self, space: DiskSpace, *, was_low: bool) -> bool:
        """Return whether less than the threshold is free.

        was_low: whether free space was low before. If so, recovery requires WATERMARK_HYSTERESIS_FACTOR times the
            threshold.
        """
        factor = WATERMARK_HYSTERESIS_FACTOR if was_low else 1.0
        files_min = space.files_total * self.percent / 100
        return space.free_bytes < factor * self.threshold_bytes(space) or space.files_free < factor * files_min


DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT_ERRNOS = DISK_FULL_ERRNOS | {errno.EIO}


def transient_disk_error(error: Exception) -> OSError | None:
    """Return the cause of an exception if it is a disk error that may be temporary: no space, over quota, I/O error."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNOS:
            return cause
    return None
