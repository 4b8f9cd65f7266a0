"""Counts a sandbox's memory mappings, which the kernel charges to a control group but does not count.

The mappings of a process are listed in /proc/PID/maps. A program can hide mappings: the memory of a process that has
ended remains as long as another process reads one of its files in /proc, such as `pagemap`, and until its last thread
has removed all mappings. A program can delay both by keeping a processor busy. Hidden mappings exist, but are
in no list. They are attributed to sandboxes like other kernel memory.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sandbox.model.fixed_limits import VMA_BYTES_MAX
from sandbox.runtimes.limits.kernel_memory import SLABS, VMA_BYTES, VMA_KIND, SlabUsage, count_used_objects
from sandbox.runtimes.limits.open_files import list_directory

_MAPS_CHUNK_BYTES = 1 << 20
_COUNT_SECONDS = 2.0
"""Maximum CPU time of one count. Long paths of mapped files make a count slow."""

_PAUSE_SECONDS = 0.5
"""Minimum pause between two counts of a sandbox. After a longer count, the pause is as long as the count."""

_BLOCKED_SECONDS = 30.0
"""A count that takes longer may be waiting for the lock on a process's memory, which a program can hold."""

_HIDDEN_CHECKS_MIN = 2
"""Number of consecutive checks that must find hidden mappings: processes may start or end during one check."""


class SandboxProcesses(NamedTuple):
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
    sandboxes: Iterable[SandboxProcesses], mappings_max: int, slabs: Path = SLABS, proc: str = "/proc"
) -> bool:
    """Return whether the machine has more than `mappings_max` mappings that /proc does not list; False if unknown.

    sandboxes: all sandboxes. A sandbox counts for at most the number of mappings that its kernel memory can contain,
    because processes that share their memory list the same mappings. If counting a sandbox's mappings takes too long,
    it counts for this maximum. If counting the host's mappings takes too long, the number of hidden mappings is
    unknown.
    """
    total = count_used_objects(VMA_KIND, slabs) or 0
    hidden, inspected = total, set[int]()
    for sandbox in sandboxes:
        count, count_max = count_mappings(sandbox.process_ids, hidden), sandbox.kernel_bytes // VMA_BYTES
        hidden -= count_max if count is None else min(count, count_max)
        if hidden <= mappings_max:
            return False
        inspected.update(sandbox.process_ids)
    others = {int(name) for name in list_directory(proc) if name.isdigit()} - inspected
    count = count_mappings(others, hidden)
    if count is None:
        return False
    # Processes that ended during the count are not listed.
    ended = max(0, total - (count_used_objects(VMA_KIND, slabs) or 0))
    return hidden - count - ended > mappings_max


class MappingMeter:
    """Counts one sandbox's mappings in a separate thread, because this can take seconds."""

    def __init__(
        self,
        count: Callable[[Iterable[int], int], int | None] = count_mappings,
        are_hidden: Callable[[Iterable[SandboxProcesses], int], bool] = are_mappings_hidden,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._are_hidden = are_hidden
        self._clock = clock
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._started_at = self._next_at = 0.0
        self._hidden_checks = 0
        """Number of consecutive checks that found hidden mappings."""

    def measure(
        self,
        slabs: SlabUsage,
        process_ids: Callable[[], Collection[int]],
        sandboxes: Callable[[], Iterable[SandboxProcesses]],
    ) -> int:
        """Return the size of the sandbox's mappings according to the last count, in bytes.

        Mappings are counted only while their growth on the machine exceeds the limit. Otherwise, the growth is an upper
        bound. While a count is blocked, returns the share that is attributed to the sandbox. sandboxes: returns all
        sandboxes.
        """
        if slabs.vma_bytes_upper_bound <= VMA_BYTES_MAX:
            return slabs.vma_bytes_upper_bound
        now = self._clock()
        if self._thread is not None and self._thread.is_alive():
            return slabs.vma_bytes if now - self._started_at > _BLOCKED_SECONDS else self._bytes
        if now >= self._next_at:
            arguments = (slabs, process_ids, sandboxes)
            thread = threading.Thread(target=self._update, args=arguments, name="count-mappings", daemon=True)
            self._started_at = now
            with suppress(RuntimeError):  # the machine has too many threads; the next call tries again
                thread.start()
                self._thread = thread
        return self._bytes

    def _update(
        self,
        slabs: SlabUsage,
        process_ids: Callable[[], Collection[int]],
        sandboxes: Callable[[], Iterable[SandboxProcesses]],
    ) -> None:
        started_at = self._clock()
        try:
            self._bytes = self._measure(slabs, process_ids, sandboxes)
        finally:
            now = self._clock()
            self._next_at = now + max(_PAUSE_SECONDS, now - started_at)

    def _measure(
        self,
        slabs: SlabUsage,
        process_ids: Callable[[], Collection[int]],
        sandboxes: Callable[[], Iterable[SandboxProcesses]],
    ) -> int:
        mappings_max = VMA_BYTES_MAX // VMA_BYTES
        own = self._count(process_ids(), mappings_max)
        if own is None or own > mappings_max:
            return slabs.vma_bytes_upper_bound
        are_hidden = slabs.vma_bytes > VMA_BYTES_MAX and self._are_hidden(sandboxes(), mappings_max)
        self._hidden_checks = self._hidden_checks + 1 if are_hidden else 0
        return slabs.vma_bytes if self._hidden_checks >= _HIDDEN_CHECKS_MIN else own * VMA_BYTES
