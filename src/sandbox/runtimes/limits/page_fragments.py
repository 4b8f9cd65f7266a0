"""Measures memory that a few bytes of unread or unsent data keep allocated.

The kernel copies what a thread sends over TCP and UDP into a block of 32 KiB, until the block is full. It charges a
socket only for the bytes that its packets use, but one byte keeps the whole block. A program can send one byte over one
connection, and the rest of the block over a connection that is read at once. With 32 MiB of charged memory, 30
connections can keep 4 GiB.

Neither a control group nor any counter of the machine contains this memory. It is what remains of the machine's memory
after all known uses. This remainder also grows for other reasons. Therefore, the blocks that a sandbox can keep are
estimated from the memory of its packets, without the data: a packet needs about 1 KiB and refers to at most 17 blocks.

The gateway sends the sandbox's data to hosts. If a host does not read, packets wait in the runner's own sockets.
"""

import fcntl
import os
import re
import socket
import struct
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from sandbox.model.fixed_limits import PAGE_FRAGMENT_BYTES_MAX
from sandbox.runtimes.limits.descriptor_tables import list_directory
from sandbox.runtimes.limits.kernel_memory_growth import read_meminfo
from sandbox.runtimes.limits.socket_usage import SocketCounter, SocketUsage, count_unlisted_sockets

_MEMINFO, _ZONES = Path("/proc/meminfo"), Path("/proc/zoneinfo")
_FIELD = re.compile(rb"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_KNOWN_USES = (
    *(b"MemFree", b"Buffers", b"Cached", b"SwapCached", b"AnonPages", b"Slab"),
    *(b"PageTables", b"SecPageTables", b"Percpu", b"VmallocUsed", b"Hugetlb"),
)

_FREE_PAGES_OF_PROCESSOR = re.compile(r"^ +count: +(\d+)$", re.MULTILINE)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_BLOCK_BYTES, _BLOCKS_OF_PACKET_MAX = 32 << 10, 17
_PACKET_BYTES_MIN = 768
"""Lower bound on the memory of a packet without its data: 896 bytes, depending on the kernel's version."""

_UNLISTED_SOCKET_BYTES_MAX, _UNACCEPTED_SOCKET_BYTES_MAX = 1 << 20, 64 << 10
"""Limits on the memory of a reset connection that a program has accepted, and of one that no program has accepted.

The kernel charges only accepted connections.
"""

_SO_MEMINFO, _MEMORY_NUMBERS = 55, struct.Struct("=I16xI12x")
"""A socket option and its value: the memory of received packets, and of those to be sent."""

_OWN_FILES = "/proc/self/fd"
_OWN_FILES_MAX = 4096
"""A process with more open files is not a runner. Its sockets are not counted, because this takes too long."""

_INTERVAL_SECONDS = 1.0
_CHECKS_MIN = 3
"""Number of consecutive checks that must find too much memory, because sizes are not read at the same time."""


def count_unattributed_bytes(path: Path = _MEMINFO) -> int | None:
    """Return the machine's memory that is in use for no known purpose, in bytes; None if the host does not show it.

    Includes the free pages that each processor keeps for itself, which can be gigabytes. Takes 0.1 ms.
    """
    try:
        text = read_meminfo(path)
    except OSError:
        return None
    sizes = {name: int(kibibytes) << 10 for name, kibibytes in _FIELD.findall(text)}
    return sizes[b"MemTotal"] - sum(sizes.get(name, 0) for name in _KNOWN_USES) if b"MemTotal" in sizes else None


def count_free_bytes_of_processors(path: Path = _ZONES) -> int:
    """Return the size of the free pages that processors keep; 0 if unknown. Takes longer with many processors."""
    try:
        return sum(map(int, _FREE_PAGES_OF_PROCESSOR.findall(path.read_text()))) * _PAGE_BYTES
    except OSError:
        return 0


def count_own_overhead_bytes() -> int:
    """Return the memory of unread and unsent packets in this process's TCP sockets, without their data.

    Takes 10 µs for each socket.
    """
    names = list_directory(_OWN_FILES)
    return sum(map(_read_overhead, names)) if len(names) <= _OWN_FILES_MAX else 0


def _read_overhead(name: str) -> int:
    with suppress(OSError):
        if not os.readlink(f"{_OWN_FILES}/{name}").startswith("socket:"):  # noqa: PTH115  (Path takes three times as long)
            return 0
        # The program may close the descriptor at any time.
        descriptor = os.dup(int(name))
        try:
            one = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            raise
        with one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                return 0
            received, unsent = _MEMORY_NUMBERS.unpack(one.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
            unread_data, unsent_data = _read_size(one, termios.FIONREAD), _read_size(one, termios.TIOCOUTQ)
            return max(0, int(received) - unread_data) + max(0, int(unsent) - unsent_data)
    return 0


def _read_size(one: socket.socket, request: int) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(one, request, bytes(4)))[0])


class PageFragmentMeter:
    """Measures the blocks that the packets of one sandbox keep allocated, in addition to their charged memory."""

    def __init__(
        self,
        count_all: Callable[[], int | None] = count_unattributed_bytes,
        count_free: Callable[[], int] = count_free_bytes_of_processors,
        count_own: Callable[[], int] = count_own_overhead_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count_all = count_all
        self._count_free = count_free
        self._count_own = count_own
        self._clock = clock
        self._lowest: int | None = None
        self._checked_at: float | None = None
        self._excesses = 0

    def measure(
        self,
        count_sockets: Callable[[], SocketUsage | None],
        count_unlisted: Callable[[int], int | None],
        charged_bytes: int | None,
    ) -> int | None:
        """Return the memory in bytes, at most the limit until several checks have found more; None if unknown.

        The sockets are counted once a second, and each time while the machine's memory has grown by more than the
        limit.

        count_sockets: returns the sockets of the sandbox's network; None if the kernel does not list them.
        count_unlisted: takes the number of listed sockets and returns that of the others; None if the sandbox has
            ended. charged_bytes: memory of all sockets that the control group is charged for; None if unknown.
        """
        total = self._count_all()
        if total is None:
            return None
        is_due = self._checked_at is None or self._clock() - self._checked_at >= _INTERVAL_SECONDS
        if not is_due and self._lowest is not None and total - self._lowest <= PAGE_FRAGMENT_BYTES_MAX:
            return max(0, total - self._lowest)
        self._checked_at = self._clock()
        total -= self._count_free()
        self._lowest = total if self._lowest is None else min(total, self._lowest)
        growth = total - self._lowest
        overhead_bytes = self._count_own() + _sum_overhead(count_sockets(), count_unlisted, charged_bytes)
        kept_max = -(-overhead_bytes // _PACKET_BYTES_MIN) * _BLOCKS_OF_PACKET_MAX * _BLOCK_BYTES
        # The sandbox did not cause more than this.
        self._lowest = max(self._lowest, total - kept_max)
        kept = min(growth, kept_max)
        self._excesses = self._excesses + 1 if kept > PAGE_FRAGMENT_BYTES_MAX else 0
        return kept if self._excesses >= _CHECKS_MIN else min(kept, PAGE_FRAGMENT_BYTES_MAX)


class SocketMemoryMeter:
    """Measures the memory of the sockets of one sandbox. counter: None if the kernel does not list sockets."""

    def __init__(self, counter: SocketCounter | None, page_fragments: PageFragmentMeter) -> None:
        self._counter = counter
        self._page_fragments = page_fragments

    def measure(
        self, pid: int, charged_bytes: int | None, *, counts_received: bool
    ) -> tuple[SocketUsage | None, int | None]:
        """Return the received data, and the memory that small packets keep; None for what is not measured now.

        pid: a process in the sandbox's network namespace. charged_bytes: see `PageFragmentMeter.measure`.
        counts_received: whether to count received data.
        """
        usage = self._count() if counts_received else None
        count_unlisted = partial(count_unlisted_sockets, pid)
        return usage, self._page_fragments.measure(lambda: usage or self._count(), count_unlisted, charged_bytes)

    def _count(self) -> SocketUsage | None:
        return None if self._counter is None else self._counter.count()


def _sum_overhead(
    usage: SocketUsage | None, count_unlisted: Callable[[int], int | None], charged_bytes: int | None
) -> int:
    """Return an upper bound on the packets' memory. Without a list of the sockets, all charged memory counts."""
    if usage is None:
        return charged_bytes or 0
    unlisted = count_unlisted(usage.listed_sockets) or 0
    unlisted_bytes = unlisted * _UNLISTED_SOCKET_BYTES_MAX
    charged_unlisted_bytes = unlisted_bytes if charged_bytes is None else min(unlisted_bytes, charged_bytes)
    return usage.overhead_bytes + unlisted * _UNACCEPTED_SOCKET_BYTES_MAX + charged_unlisted_bytes
