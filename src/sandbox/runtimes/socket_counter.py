"""Counts what TCP and UDP sockets of a sandbox hold that nobody inside has taken out, see sock_diag(7).

Data that arrived are charged or bounded, but errors and time stamps of what was sent wait in the same queue and are
neither: SO_TIMESTAMPING also comes beside a message, where no filter sees it.
"""

import errno
import socket
import struct
import threading

import msgspec

SOCK_DIAG = 4
"""The netlink protocol. A socket of it sees the network namespace that it was made in."""

_REQUEST, _ANSWERS_BYTES = 20, 1 << 17
_DUMP = 0x301
_ERROR, _DONE = 2, 3
_HEADER_BYTES, _ANSWER_BYTES = 16, 72
_SYN_RECEIVED, _TIME_WAIT = 3, 6
_STATES = 0xFFFFFFFF & ~(1 << _TIME_WAIT)
_MEMORY = 7
"""INET_DIAG_SKMEMINFO: an attribute of numbers. The first one is what waits to be received, errors included."""

_ENOUGH_SOCKETS = 65536
"""So many are looked at; more are past every bound."""
_ANSWER_SECONDS = 2.0


class Waiting(msgspec.Struct, frozen=True):
    """received_bytes: in the queues to be received from. half_open: connections that only the listener has."""

    received_bytes: int = 0
    half_open: int = 0


class SocketCounter:
    """On a netlink socket of SOCK_DIAG, taken over."""

    def __init__(self, netlink: socket.socket) -> None:
        netlink.settimeout(_ANSWER_SECONDS)
        self._netlink = netlink
        self._lock = threading.Lock()
        self._sequence = 0

    def count(self) -> Waiting | None:
        """None where this kernel does not tell, or not in time."""
        with self._lock:
            try:
                kinds = [(family, protocol) for family in (2, 10) for protocol in (6, 17)]
                counts = [self._count(family, protocol) for family, protocol in kinds]
            except OSError:
                return None
        return Waiting(sum(one.received_bytes for one in counts), sum(one.half_open for one in counts))

    def close(self) -> None:
        """Counts nothing any more."""
        self._netlink.close()

    def _count(self, family: int, protocol: int) -> Waiting:
        self._sequence += 1
        body = struct.pack("=BBBxI48x", family, protocol, 1 << (_MEMORY - 1), _STATES)
        header = struct.pack("=IHHII", _HEADER_BYTES + len(body), _REQUEST, _DUMP, self._sequence, 0)
        self._netlink.send(header + body)
        received, half_open, looked_at = 0, 0, 0
        while looked_at < _ENOUGH_SOCKETS:
            answers = self._netlink.recv(_ANSWERS_BYTES)
            at = 0
            while at < len(answers):
                length, kind, _, sequence = struct.unpack_from("=IHHI", answers, at)
                if sequence == self._sequence:
                    if kind in (_DONE, _ERROR):
                        refuse(answers, at, length)
                        return Waiting(received, half_open)
                    looked_at += 1
                    half_open += answers[at + _HEADER_BYTES + 1] == _SYN_RECEIVED
                    received += read_memory(answers, at + _HEADER_BYTES + _ANSWER_BYTES, at + length)
                at += -(-length // 4) * 4
        return Waiting(received, half_open)


def refuse(answers: bytes, at: int, length: int) -> None:
    """Raise OSError for the error at the end. ENOENT: the kernel has no such sockets, or no part that tells of them."""
    (number,) = struct.unpack_from("=i", answers, at + _HEADER_BYTES) if length > _HEADER_BYTES else (0,)
    if number and -number != errno.ENOENT:
        raise OSError(-number, "sock_diag")


def read_memory(answers: bytes, at: int, end: int) -> int:
    """From the attributes of one socket."""
    while at + 4 < end:
        length, kind = struct.unpack_from("=HH", answers, at)
        if kind == _MEMORY:
            (received,) = struct.unpack_from("=I", answers, at + 4)
            return int(received)
        at += -(-max(length, 4) // 4) * 4
    return 0
