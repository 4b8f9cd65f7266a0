"""Counts the sockets of a network namespace, and measures the memory that their unread or unsent data keeps allocated.

The kernel copies what a thread sends over TCP and UDP into a block of 32 KiB, until the block is full. It charges a
socket only for the bytes that its packets use, but one byte keeps the whole block. A program can send one byte over one
connection, and the rest of the block over a connection that is read immediately. With 32 MiB of charged memory, 30
connections can keep 4 GiB.

Neither a control group nor any counter of the machine contains this memory. It is what remains of the machine's memory
after all known uses. This remainder also grows for other reasons. Therefore, the blocks that a sandbox can keep are
estimated from the memory of its packets, without the data: a packet needs about 1 KiB and refers to at most 17 blocks.

The gateway sends the sandbox's data to hosts. If a host does not read, packets wait in the runner's own sockets.
"""

import errno
import fcntl
import os
import re
import socket
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from sandbox.model.fixed_limits import PAGE_FRAGMENT_BYTES_MAX
from sandbox.runtimes.limits.kernel_memory import read_meminfo
from sandbox.runtimes.limits.open_files import list_directory

_RMEM_COLUMN, _SOCKETS_COLUMN = 4, 2
_OTHER_PROTOCOLS = ("UNIX", "NETLINK")


def count_sockets(pid: int) -> int | None:
    """Count all sockets in a process's network namespace: open, not yet accepted, or closed with data in flight.

    Returns None if the process has ended.
    """
    try:
        text = Path(f"/proc/{pid}/net/sockstat").read_text()
    except OSError:
        return None
    return int(text.split(maxsplit=3)[2])


def count_netlink_bytes(pid: int) -> int | None:
    """Return the unread bytes in the network namespace's netlink sockets; None if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/net/netlink").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[_RMEM_COLUMN]) for line in lines[1:])


SOCK_DIAG = 4
"""Netlink protocol. Its sockets report on the network namespace in which they were created."""

_SOCK_DIAG_BY_FAMILY, _MESSAGES_BYTES = 20, 1 << 17
_DUMP_FLAGS = 0x301
_ERROR, _DONE = 2, 3
_HEADER_BYTES, _RESPONSE_BYTES = 16, 72
_PORT_OFFSET, _QUEUES_OFFSET = 4, 56
_TCP, _UDP = 6, 17
_SYN_RECEIVED, _TIME_WAIT = 3, 6
_COUNTED_STATES = 0xFFFFFFFF & ~(1 << _TIME_WAIT)
_SKMEMINFO = 7
"""INET_DIAG_SKMEMINFO: several numbers, see `SocketMemory`."""

_DATAGRAM_OVERHEAD_DIVISOR = 8
"""This share of a UDP socket's memory counts as overhead.

The kernel does not report how much of the memory is data. A datagram is in at most two blocks that it shares, and a TCP
packet in seventeen.
"""

_COUNTED_SOCKETS_MAX = 65536
"""Maximum number of sockets to inspect. A larger number exceeds every limit."""
_RESPONSE_SECONDS = 2.0


class SocketUsage(msgspec.Struct, frozen=True):
    """The TCP and UDP sockets of a network namespace, and the memory of their packets.

    received_bytes: bytes in receive queues. half_open: number of connections in SYN_RECV, which belong to the listener.
    overhead_bytes: memory of unread and unsent packets, without their data.
    listed_sockets: number of sockets, without half-open connections. The kernel lists neither reset connections nor
    sockets without an address.
    udp_sockets_on_port: number of UDP sockets on the port that has the most. The kernel copies a broadcast to all of
    them without interruption.
    """

    received_bytes: int = 0
    half_open: int = 0
    udp_sockets_on_port: int = 0
    overhead_bytes: int = 0
    listed_sockets: int = 0


class SocketMemory(NamedTuple):
    """The memory of one socket in bytes: received packets, packets to be sent, and packets that wait for its lock."""

    received: int = 0
    unsent: int = 0
    waiting: int = 0


class SocketCounter:
    """Counts sockets through a SOCK_DIAG netlink socket. Takes ownership of the netlink socket."""

    def __init__(self, netlink: socket.socket) -> None:
        netlink.settimeout(_RESPONSE_SECONDS)
        self._netlink = netlink
        self._lock = threading.Lock()
        self._sequence = 0

    def count(self) -> SocketUsage | None:
        """Return the current usage, or None if this kernel does not report it or did not respond in time."""
        with self._lock:
            try:
                ports: Counter[int] = Counter()
                kinds = [(family, protocol) for family in (2, 10) for protocol in (_TCP, _UDP)]
                counts = [self._count(family, protocol, ports) for family, protocol in kinds]
            except OSError:
                return None
        return SocketUsage(
            sum(one.received_bytes for one in counts),
            sum(one.half_open for one in counts),
            max(ports.values(), default=0),
            sum(one.overhead_bytes for one in counts),
            sum(one.listed_sockets for one in counts),
        )

    def close(self) -> None:
        """Close the netlink socket."""
        self._netlink.close()

    def _count(self, family: int, protocol: int, udp_ports: Counter[int]) -> SocketUsage:
        self._sequence += 1
        body = struct.pack("=BBBxI48x", family, protocol, 1 << (_SKMEMINFO - 1), _COUNTED_STATES)
        header = struct.pack("=IHHII", _HEADER_BYTES + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP_FLAGS, self._sequence, 0)
        self._netlink.send(header + body)
        received, half_open, overhead, inspected_count = 0, 0, 0, 0
        while inspected_count < _COUNTED_SOCKETS_MAX:
            messages = self._netlink.recv(_MESSAGES_BYTES)
            at = 0
            while at < len(messages):
                length, kind, _, sequence = struct.unpack_from("=IHHI", messages, at)
                if sequence == self._sequence:
                    if kind in (_DONE, _ERROR):
                        raise_netlink_error(messages, at, length)
                        return SocketUsage(received, half_open, 0, overhead, inspected_count - half_open)
                    inspected_count += 1
                    half_open += messages[at + _HEADER_BYTES + 1] == _SYN_RECEIVED
                    if protocol == _UDP:
                        udp_ports[read_local_port(messages, at)] += 1
                    memory = read_socket_memory(messages, at + _HEADER_BYTES + _RESPONSE_BYTES, at + length)
                    received += memory.received
                    overhead += packet_overhead_bytes(messages, at, memory, protocol)
                at += -(-length // 4) * 4
        return SocketUsage(received, half_open, 0, overhead, inspected_count - half_open)


def raise_netlink_error(messages: bytes, at: int, length: int) -> None:
    """Raise OSError for the error in the final message.

    ENOENT is ignored: the kernel has no such sockets, or no sock_diag module for them.
    """
    (number,) = struct.unpack_from("=i", messages, at + _HEADER_BYTES) if length > _HEADER_BYTES else (0,)
    if number and -number != errno.ENOENT:
        raise OSError(-number, "sock_diag")


def read_local_port(messages: bytes, at: int) -> int:
    """Return the local port of the socket that a reply describes."""
    return int.from_bytes(messages[at + _HEADER_BYTES + _PORT_OFFSET :][:2])


def read_socket_memory(messages: bytes, at: int, end: int) -> SocketMemory:
    """Return the memory of the queues of one socket, from its attributes."""
    while at + 4 < end:
        length, kind = struct.unpack_from("=HH", messages, at)
        if kind == _SKMEMINFO:
            return SocketMemory(*struct.unpack_from("=I16xI4xI", messages, at + 4))
        at += -(-max(length, 4) // 4) * 4
    return SocketMemory()


def packet_overhead_bytes(messages: bytes, at: int, memory: SocketMemory, protocol: int) -> int:
    """Return the memory of the socket's packets, without their data. The reply contains the sizes of the data."""
    if protocol == _UDP:
        return memory.received // _DATAGRAM_OVERHEAD_DIVISOR
    unread, unsent = struct.unpack_from("=II", messages, at + _HEADER_BYTES + _QUEUES_OFFSET)
    return max(0, memory.received - int(unread)) + max(0, memory.unsent - int(unsent)) + memory.waiting


def count_unlisted_sockets(pid: int, listed_sockets: int) -> int | None:
    """Count the TCP and UDP sockets of a process's network namespace that the kernel does not list.

    These are reset connections, which keep unread data, and sockets without an address. Sockets of other kinds that the
    kernel does not count either are included. Returns None if the process has ended.

    listed_sockets: number of listed sockets.
    """
    sockets = count_sockets(pid)
    try:
        lines = Path(f"/proc/{pid}/net/protocols").read_text().splitlines()
    except OSError:
        return None
    if sockets is None:
        return None
    others = sum(int(line.split()[_SOCKETS_COLUMN]) for line in lines[1:] if line.startswith(_OTHER_PROTOCOLS))
    return max(0, sockets - others - listed_sockets)


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
"""Lower bound on the memory of a packet without its data. With some versions of the kernel, it is 896 bytes."""

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
    """Return the machine's memory that no kernel statistic explains, in bytes; None if the host does not show it.

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
