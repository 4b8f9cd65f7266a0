"""Resources of hosts and tasks: CPUs, memory and disk; free-space thresholds, and errors of a full disk."""

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import msgspec

from sandbox.model.display_text import format_gib
from sandbox.model.fixed_limits import WATERMARK_HYSTERESIS_FACTOR
from sandbox.model.manifest.schema import Vm


class Resources(msgspec.Struct, frozen=True):
    """CPUs, memory and disk, in total or for one task."""

    cpus: int
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return f"{self.cpus} CPUs, {format_gib(self.memory_bytes)} of memory and {format_gib(self.disk_bytes)} of disk"

    @classmethod
    def requested_by(cls, vm: Vm) -> "Resources":
        """Return the resources that a manifest requests."""
        return cls(vm.cpus, vm.memory_bytes, vm.disk_bytes)

    def fits_in(self, available: "Resources") -> bool:
        """Return whether all resources are available."""
        return (
            self.cpus <= available.cpus
            and self.memory_bytes <= available.memory_bytes
            and self.disk_bytes <= available.disk_bytes
        )

    def describe_shortfall(self, available: "Resources", qualifier: str = "free") -> list[str]:
        """Describe the missing resources in human-readable form; empty if all are available."""
        shortfall = []
        if self.cpus > available.cpus:
            shortfall.append(f"{self.cpus} CPUs ({max(available.cpus, 0)} {qualifier})")
        for name, required, available_bytes in (
            ("memory", self.memory_bytes, available.memory_bytes),
            ("disk", self.disk_bytes, available.disk_bytes),
        ):
            if required > available_bytes:
                shortfall.append(
                    f"{format_gib(required)} of {name} ({format_gib(max(available_bytes, 0))} {qualifier})"
                )
        return shortfall


def pareto_frontier(sizes: Iterable[Resources]) -> Sequence[Resources]:
    """Return the sizes that no other size matches or exceeds in every resource, sorted by descending number of CPUs.

    Sizes are visited in this order. `frontier` contains the largest pairs of memory and disk among the visited sizes,
    sorted by ascending memory and descending disk. A size is omitted if the first pair with at least as much memory
    also has at least as much disk.
    """
    result: list[Resources] = []
    frontier: list[tuple[int, int]] = []
    for size in sorted({*sizes}, key=lambda size: (size.cpus, size.memory_bytes, size.disk_bytes), reverse=True):
        position = bisect_left(frontier, (size.memory_bytes, 0))
        if position < len(frontier) and frontier[position][1] >= size.disk_bytes:
            continue
        result.append(size)
        end = bisect_right(frontier, size.memory_bytes, key=lambda pair: pair[0])
        begin = position
        while begin > 0 and frontier[begin - 1][1] <= size.disk_bytes:
            begin -= 1
        frontier[begin:end] = [(size.memory_bytes, size.disk_bytes)]
    return result


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
