"""Only one server can use a port, and the port refuses connections until that server listens."""

import socket

import pytest

from sandbox.api.http.server import UNREAD_BYTES_MAX, UNSENT_BYTES_MAX, AddressError, bind, listen


def close(sockets):
    for listener in sockets:
        listener.close()


def test_bound_port_refuses_connections_until_the_server_listens():
    sockets = bind("127.0.0.1", 0)
    address = sockets[0].getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    listen(sockets)
    socket.create_connection(address, 5).close()
    close(sockets)


def test_second_listener_on_a_port_raises_address_error():
    first = bind("127.0.0.1", 0)
    port = first[0].getsockname()[1]
    second = bind("127.0.0.1", port)
    listen(first)
    with pytest.raises(AddressError, match=f"port {port}: Address already in use.*--ws-port"):
        listen(second, "ws_port")
    close([*first, *second])
    third = bind("127.0.0.1", port)
    listen(third)
    close(third)


def test_bind_to_a_port_in_use_raises_address_error():
    first = bind("127.0.0.1", 0)
    listen(first)
    with pytest.raises(AddressError, match="Choose another port with --port"):
        bind("127.0.0.1", first[0].getsockname()[1])
    close(first)


def test_kernel_buffers_of_a_connection_are_small():
    for listener in bind("127.0.0.1", 0):
        with listener:
            listener.listen()
            with socket.create_connection(listener.getsockname()[:2]):
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * UNREAD_BYTES_MAX
                    unsent = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                    assert unsent == UNSENT_BYTES_MAX
