"""The launcher's SOCK_DIAG socket, which is used to count the sockets of a sandbox."""

import socket

import pytest

from sandbox.runtimes.programs import launcher


def test_sock_diag_socket_has_packet_timestamps_enabled():
    counters = launcher.open_sock_diag()
    if not counters:
        pytest.skip("this kernel has no SOCK_DIAG")
    try:
        assert counters[0].getsockopt(socket.SOL_SOCKET, launcher.SO_TIMESTAMP) == 1
    finally:
        counters[0].close()
