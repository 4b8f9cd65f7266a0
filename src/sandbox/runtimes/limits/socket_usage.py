"""Counts the sockets of a network namespace, and the received data in them that no program has read."""

import errno
import socket
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

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
    """Received data that no program has read.

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
