"""A server's ports are its own, and nobody is kept waiting at one before it can answer."""

import socket

import pytest

from sandbox.api.http.server import UNREAD_BYTES_MAX, UNSENT_BYTES_MAX, AddressError, bind, listen


def close(sockets):
    for one in sockets:
        one.close()


def test_who_comes_before_the_server_can_answer_is_refused_and_afterwards_is_not():
    bound = bind("127.0.0.1", 0)
    address = bound[0].getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    listen(bound)
    socket.create_connection(address, 5).close()
    close(bound)


def test_of_two_that_start_at_once_on_one_port_one_has_it_and_the_other_is_told():
    one = bind("127.0.0.1", 0)
    port = one[0].getsockname()[1]
    other = bind("127.0.0.1", port)
    listen(one)
    with pytest.raises(AddressError, match=f"port {port}: Address already in use.*--ws-port"):
        listen(other, "ws_port")
    close([*one, *other])
    again = bind("127.0.0.1", port)
    listen(again)
    close(again)


def test_a_port_that_is_taken_is_told_at_once():
    one = bind("127.0.0.1", 0)
    listen(one)
    with pytest.raises(AddressError, match="Choose another port with --port"):
        bind("127.0.0.1", one[0].getsockname()[1])
    close(one)


def test_the_kernel_buffers_little_for_a_connection():
    for listening in bind("127.0.0.1", 0):
        with listening:
            listening.listen()
            with socket.create_connection(listening.getsockname()[:2]):
                accepted, _ = listening.accept()
                with accepted:
                    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * UNREAD_BYTES_MAX
                    unsent = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                    assert unsent == UNSENT_BYTES_MAX
