"""Monitors free space in the data directory's file system."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from sandbox.interfaces.disks import DiskReserve, MeasureDiskSpace
from sandbox.model.disk_space import DiskSpace, Watermark
from sandbox.model.fixed_limits import (
    DISK_SPACE_CHECK_INTERVAL_SECONDS,
    SERVER_RESERVE_BYTES,
    WATERMARK_HYSTERESIS_FACTOR,
)

_log = logging.getLogger(__name__)
_UNKNOWN_SPACE = DiskSpace(0, 0)


class DiskMonitor:
    """Decides whether new tasks wait for disk space, and manages a reserve for records that must always be written."""

    def __init__(self, data_dir: Path, measure: MeasureDiskSpace, watermark: Watermark, reserve: DiskReserve) -> None:
        self.space = _UNKNOWN_SPACE
        self.shortage: str | None = None
        """Why new tasks wait (human-readable); set by `check`."""
        self._data_dir = data_dir
        self._measure = measure
        self._watermark = watermark
        self._reserve = reserve

    async def run(self, on_space_freed: Callable[[], None]) -> None:
        """Check the free space periodically. on_space_freed: called when new tasks no longer need to wait."""
        while True:
            was_short = self.check() is not None
            await asyncio.sleep(DISK_SPACE_CHECK_INTERVAL_SECONDS)
            if was_short and self.check() is None:
                on_space_freed()

    def check(self) -> str | None:
        """Measure free space, then release or allocate the reserve as needed. Return the shortage, if any."""
        previous = self.shortage
        try:
            self.space = self._measure()
            self.shortage = self._find_shortage(was_short=previous is not None)
            self._adjust_reserve()
        except OSError as error:
            self.shortage = f"The disk of {self._data_dir} cannot be checked: {error.strerror}."
        if self.shortage is not None and previous is None:
            _log.warning("New tasks wait. %s", self.shortage)
        elif self.shortage is None and previous is not None:
            _log.info("The disk of %s has enough free space again", self._data_dir)
        return self.shortage

    def _find_shortage(self, *, was_short: bool) -> str | None:
        if self.space.is_read_only:
            return f"The disk of {self._data_dir} is read-only."
        # New tasks cannot use the space of a released reserve: before they start, the reserve is allocated again.
        space = self.space if self._reserve.is_allocated else self.space.minus_reserve(SERVER_RESERVE_BYTES)
        if not self._watermark.is_low(space, was_low=was_short):
            return None
        required_bytes = int(self._watermark.threshold_bytes(self.space) * WATERMARK_HYSTERESIS_FACTOR)
        if space.free_bytes >= required_bytes:
            return f"The disk of {self._data_dir} has almost no free inodes; remove files."
        return (
            f"The disk of {self._data_dir} is nearly full: {_format_mebibytes(max(space.free_bytes, 0))} are free, "
            f"but new tasks need {_format_mebibytes(required_bytes)}."
        )

    def _adjust_reserve(self) -> None:
        has_no_inodes = self.space.files_total > 0 and self.space.files_free == 0
        if self.shortage is not None and (has_no_inodes or self.space.free_bytes < SERVER_RESERVE_BYTES):
            self._reserve.release()
        elif self.shortage is None:
            with contextlib.suppress(OSError):
                self._reserve.allocate()


def _format_mebibytes(byte_count: int) -> str:
    return f"{byte_count // 1024**2} MiB"
