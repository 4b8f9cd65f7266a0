"""What waits in sockets of a network namespace is read from answers of the kernel."""

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from sandbox.runtimes.limits.kernel_usage import SOCK_DIAG, SocketCounter, Waiting

SYN_RECEIVED, ESTABLISHED = 3, 1
MEMORY, CONGESTION = 7, 4


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, sequence: int) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, sequence, 0) + body + bytes(-len(body) % 4)


def answer(state: int, received: int | None, sequence: int, port: int = 0) -> bytes:
    """Of one socket; one that is half open has no memory of its own."""
    memory = b"" if received is None else attribute(MEMORY, struct.pack("=9I", received, 212992, *[5] * 7))
    return message(
        20,
        bytes([2, state, 0, 0]) + port.to_bytes(2) + bytes(66) + attribute(CONGESTION, b"cubic\0") + memory,
        sequence,
    )


def end(sequence: int, number: int = 0) -> bytes:
    return message(2 if number else 3, struct.pack("=i", number), sequence)


@contextmanager
def counting(answers: Sequence[bytes]) -> Iterator[SocketCounter]:
    """With a kernel that has said this already."""
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernels:
        for one in answers:
            kernels.send(one)
        counter = SocketCounter(ours)
        try:
            yield counter
        finally:
            counter.close()


def test_all_four_kinds_of_sockets_are_added_up():
    first = answer(ESTABLISHED, 1000, 1) + answer(SYN_RECEIVED, None, 1) + answer(SYN_RECEIVED, None, 1)
    answers = [first, answer(ESTABLISHED, 200, 1), end(1), answer(7, 30, 2) + end(2), answer(10, 0, 3), end(3), end(4)]
    with counting(answers) as counter:
        assert counter.count() == Waiting(received_bytes=1230, half_open=2, udp_sockets_on_port=1)


def test_udp_sockets_are_counted_for_each_port_over_both_families():
    both = [answer(7, 0, sequence, 53) + answer(7, 0, sequence, 54) + end(sequence) for sequence in (2, 4)]
    streams = [answer(ESTABLISHED, 0, sequence, 53) * 5 + end(sequence) for sequence in (1, 3)]
    with counting([streams[0], both[0], streams[1], both[1]]) as counter:
        assert counter.count() == Waiting(udp_sockets_on_port=2)


def test_answers_to_an_earlier_question_do_not_count():
    answers = [answer(ESTABLISHED, 999, 0), end(0), answer(ESTABLISHED, 1, 1) + end(1), end(2), end(3), end(4)]
    with counting(answers) as counter:
        assert counter.count() == Waiting(received_bytes=1)


def test_a_kernel_without_one_kind_of_sockets_counts_the_others():
    answers = [answer(ESTABLISHED, 5, 1) + end(1), end(2, -errno.ENOENT), end(3), end(4, -errno.ENOENT)]
    with counting(answers) as counter:
        assert counter.count() == Waiting(received_bytes=5)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_a_kernel_that_refuses_counts_nothing(number: int):
    with counting([end(1, -number)]) as counter:
        assert counter.count() is None


def test_the_machines_own_kernel_answers():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, socket.create_server(("127.0.0.1", 0)) as door:
        one.bind(("127.0.0.1", 0))
        with socket.create_connection(door.getsockname()) as stream:
            accepted, _ = door.accept()
            for _ in range(3):
                one.sendto(bytes(10000), one.getsockname())
            stream.sendall(bytes(10000))
            counter = SocketCounter(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG))
            waiting = counter.count()
            counter.close()
            accepted.close()
    assert waiting is not None
    assert waiting.received_bytes >= 40000
    assert counter.count() is None
