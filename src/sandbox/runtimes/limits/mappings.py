"""Counts a sandbox's memory mappings, which the kernel charges to a control group but does not count.

The mappings of a process are listed in /proc/PID/maps. A program can hide mappings: the memory of a process that has
ended remains as long as another process reads one of its files in /proc, such as `pagemap`, and until its last thread
has removed all mappings. A program can delay both by keeping a processor busy. Hidden mappings are on the machine, but
in no list. They are attributed to sandboxes like other kernel memory.
"""

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sandbox.model.fixed_limits import VMA_BYTES_MAX
from sandbox.runtimes.limits.open_files import list_directory
from sandbox.runtimes.limits.slab_usage import VMA_BYTES, SlabUsage

_MAPS_CHUNK_BYTES = 1 << 20
_COUNT_SECONDS = 2.0
"""Maximum CPU time of one count. Long paths of mapped files make a count slow."""

_PAUSE_SECONDS = 0.5
"""Minimum pause between two counts of a sandbox. After a longer count, the pause is as long as the count."""

_SLABS = Path("/proc/slabinfo")
_ACTIVE_MAPPINGS = re.compile(r"^vm_area_struct +(\d+) ", re.MULTILINE)


class MappingOwner(NamedTuple):
    """A sandbox's processes, and the kernel memory that its control group is charged for."""

    process_ids: Collection[int]
    kernel_bytes: int


def count_mappings(process_ids: Iterable[int], mappings_max: int) -> int | None:
    """Count the memory mappings of processes. Stops once there are more than `mappings_max`.

    Processes that share their memory are counted separately. Takes about 1 s of CPU time for a million mappings.
    Returns None if counting takes too long.
    """
    deadline, count = time.thread_time() + _COUNT_SECONDS, 0
    for pid in process_ids:
        found = _count_mappings_of_thread(f"/proc/{pid}", mappings_max - count, deadline)
        if not found:  # the first thread may have ended before the others
            threads = (f"/proc/{pid}/task/{thread}" for thread in list_directory(f"/proc/{pid}/task"))
            counts = (_count_mappings_of_thread(each, mappings_max - count, deadline) for each in threads)
            found = next(filter(None, counts), 0)
        count += found
        if count > mappings_max:
            return count
        if time.thread_time() > deadline:
            return None
    return count


def _count_mappings_of_thread(thread_directory: str, mappings_max: int, deadline: float) -> int:
    count = 0
    with suppress(OSError), Path(f"{thread_directory}/maps").open("rb", buffering=0) as maps:
        while count <= mappings_max and (chunk := maps.read(_MAPS_CHUNK_BYTES)):
            count += chunk.count(b"\n")
            if time.thread_time() > deadline:
                break
    return count


def are_mappings_hidden(
    owners: Iterable[MappingOwner], mappings_max: int, slabs: Path = _SLABS, proc: str = "/proc"
) -> bool:
    """Return whether the machine has more than `mappings_max` mappings that are in no list, or counting takes too long.

    owners: all sandboxes. The mappings of a sandbox are not more than its kernel memory can contain: processes that
    share their memory list the same mappings.
    """
    try:
        active = _ACTIVE_MAPPINGS.search(slabs.read_text())
    except OSError:
        return False
    hidden, inspected = int(active[1]) if active else 0, set[int]()
    for owner in owners:
        count = count_mappings(owner.process_ids, hidden)
        if count is None:
            return True
        hidden -= min(count, owner.kernel_bytes // VMA_BYTES)
        if hidden <= mappings_max:
            return False
        inspected.update(owner.process_ids)
    others = {int(name) for name in list_directory(proc) if name.isdigit()} - inspected
    count = count_mappings(others, hidden)
    return count is None or hidden - count > mappings_max


class MappingCounter:
    """Counts one sandbox's mappings in a separate thread, because this can take seconds."""

    def __init__(
        self,
        count: Callable[[Iterable[int], int], int | None] = count_mappings,
        are_hidden: Callable[[Iterable[MappingOwner], int], bool] = are_mappings_hidden,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._are_hidden = are_hidden
        self._clock = clock
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._next_at = 0.0

    def measure(
        self,
        slabs: SlabUsage,
        process_ids: Callable[[], Collection[int]],
        owners: Callable[[], Iterable[MappingOwner]],
    ) -> int:
        """Return the size of the sandbox's mappings according to the last count, in bytes.

        Mappings are counted only while their growth on the machine exceeds the limit. Otherwise, the growth is an upper
        bound. owners: returns all sandboxes.
        """
        if slabs.vma_growth_bytes <= VMA_BYTES_MAX:
            return slabs.vma_growth_bytes
        if (self._thread is None or not self._thread.is_alive()) and self._clock() >= self._next_at:
            arguments = (slabs, process_ids, owners)
            self._thread = threading.Thread(target=self._update, args=arguments, name="count-mappings", daemon=True)
            self._thread.start()
        return self._bytes

    def _update(
        self,
        slabs: SlabUsage,
        process_ids: Callable[[], Collection[int]],
        owners: Callable[[], Iterable[MappingOwner]],
    ) -> None:
        started_at, mappings_max = self._clock(), VMA_BYTES_MAX // VMA_BYTES
        own = self._count(process_ids(), mappings_max)
        if own is None or own > mappings_max:
            self._bytes = slabs.vma_growth_bytes
        elif slabs.vma_bytes > VMA_BYTES_MAX and self._are_hidden(owners(), mappings_max):
            self._bytes = slabs.vma_bytes
        else:
            self._bytes = own * VMA_BYTES
        now = self._clock()
        self._next_at = now + max(_PAUSE_SECONDS, now - started_at)
