"""Queued socket data in a network namespace, parsed from netlink responses."""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from sandbox.runtimes.limits.socket_memory import SOCK_DIAG, SocketCounter, SocketUsage, count_unlisted_sockets

SYN_RECEIVED, ESTABLISHED, LISTENING = 3, 1, 10
MEMORY, CONGESTION = 7, 4


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, sequence: int) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, sequence, 0) + body + bytes(-len(body) % 4)


def socket_response(
    state: int,
    received: int | None,
    sequence: int,
    port: int = 0,
    *,
    queues: tuple[int, int] | None = None,
    unsent: int = 0,
    waiting: int = 0,
) -> bytes:
    """Build the response for one socket. A half-open socket has no memory attribute.

    queues: sizes of the unread and the unsent data; by default, packets have no overhead.
    """
    numbers = (received or 0, 212992, 5, 212992, 5, unsent, 5, waiting, 5)
    memory = b"" if received is None else attribute(MEMORY, struct.pack("=9I", *numbers))
    sizes = struct.pack("=II", *((received or 0, unsent) if queues is None else queues))
    body = bytes([2, state, 0, 0]) + port.to_bytes(2) + bytes(50) + sizes + bytes(8)
    return message(20, body + attribute(CONGESTION, b"cubic\0") + memory, sequence)


def end(sequence: int, number: int = 0) -> bytes:
    return message(2 if number else 3, struct.pack("=i", number), sequence)


@contextmanager
def socket_counter(responses: Sequence[bytes]) -> Iterator[SocketCounter]:
    """Yield a counter whose socket has already received these responses from the kernel."""
    local, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        for response in responses:
            kernel.send(response)
        counter = SocketCounter(local)
        try:
            yield counter
        finally:
            counter.close()


def test_all_four_socket_kinds_are_summed():
    first = (
        socket_response(ESTABLISHED, 1000, 1)
        + socket_response(SYN_RECEIVED, None, 1)
        + socket_response(SYN_RECEIVED, None, 1)
    )
    responses = [
        first,
        socket_response(ESTABLISHED, 200, 1),
        end(1),
        socket_response(7, 30, 2) + end(2),
        socket_response(10, 0, 3),
        end(3),
        end(4),
    ]
    with socket_counter(responses) as counter:
        assert counter.count() == SocketUsage(
            1230, half_open=2, udp_sockets_on_port=1, overhead_bytes=3, listed_sockets=4
        )


def test_overhead_is_the_memory_of_packets_without_their_data():
    streams = (
        socket_response(ESTABLISHED, 900, 1, queues=(1, 0), unsent=0)
        + socket_response(ESTABLISHED, 0, 1, queues=(0, 10), unsent=710)
        + socket_response(ESTABLISHED, 0, 1, waiting=50)
        + socket_response(LISTENING, 0, 1, queues=(3, 4096))
    )
    with socket_counter([streams, end(1), end(2), end(3), end(4)]) as counter:
        assert counter.count() == SocketUsage(900, overhead_bytes=899 + 700 + 50, listed_sockets=4)


def test_udp_sockets_per_port_are_counted_over_both_address_families():
    datagrams = [
        socket_response(7, 0, sequence, 53) + socket_response(7, 0, sequence, 54) + end(sequence) for sequence in (2, 4)
    ]
    streams = [socket_response(ESTABLISHED, 0, sequence, 53) * 5 + end(sequence) for sequence in (1, 3)]
    with socket_counter([streams[0], datagrams[0], streams[1], datagrams[1]]) as counter:
        assert counter.count() == SocketUsage(udp_sockets_on_port=2, listed_sockets=14)


def test_responses_to_an_earlier_request_are_ignored():
    responses = [
        socket_response(ESTABLISHED, 999, 0),
        end(0),
        socket_response(ESTABLISHED, 1, 1) + end(1),
        end(2),
        end(3),
        end(4),
    ]
    with socket_counter(responses) as counter:
        assert counter.count() == SocketUsage(received_bytes=1, listed_sockets=1)


def test_missing_socket_kind_is_skipped():
    responses = [socket_response(ESTABLISHED, 5, 1) + end(1), end(2, -errno.ENOENT), end(3), end(4, -errno.ENOENT)]
    with socket_counter(responses) as counter:
        assert counter.count() == SocketUsage(received_bytes=5, listed_sockets=1)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_kernel_error_returns_no_count(number: int):
    with socket_counter([end(1, -number)]) as counter:
        assert counter.count() is None


def test_real_kernel_returns_counts():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        udp_socket.bind(("127.0.0.1", 0))
        with socket.create_connection(listener.getsockname()) as stream:
            accepted, _ = listener.accept()
            for _ in range(3):
                udp_socket.sendto(bytes(10000), udp_socket.getsockname())
            stream.sendall(bytes(10000))
            counter = SocketCounter(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG))
            waiting = counter.count()
            counter.close()
            accepted.close()
    assert waiting is not None
    assert waiting.received_bytes >= 40000
    assert 0 < waiting.overhead_bytes < waiting.received_bytes
    assert counter.count() is None


def test_reset_connections_are_not_listed():
    counter = SocketCounter(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(50)]
        before = counter.count()
        for client, accepted in pairs:
            accepted.sendall(b"x")
            client.recv(1, socket.MSG_PEEK)
            client.close()  # with unread data, so the kernel resets the connection
        after = counter.count()
        assert before is not None
        assert after is not None
        unlisted = count_unlisted_sockets(os.getpid(), after.listed_sockets)
        for _, accepted in pairs:
            accepted.close()
    counter.close()
    assert unlisted is not None
    assert unlisted >= 50
    assert count_unlisted_sockets(2**22 + 1, 0) is None
