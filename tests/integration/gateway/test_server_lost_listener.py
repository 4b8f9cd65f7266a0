"""A gateway whose listener is lost fails instead of waiting forever for connections."""

import asyncio
import socket

import pytest

from doubles.served_gateway import run, served_gateway


@pytest.mark.parametrize("listener", ["model", "proxy", "dns_tcp"])
def test_gateway_fails_if_it_loses_a_listener(listener):
    async def scenario():
        async with served_gateway("http://127.0.0.1:9") as served:
            # This simulates a listener that the kernel has destroyed: the socket remains, but does not listen.
            getattr(served.listeners, listener).shutdown(socket.SHUT_RDWR)
            await asyncio.wait({served.serving}, timeout=10)
            assert served.serving.done()

    with pytest.raises(ExceptionGroup) as raised:
        run(scenario)
    assert raised.group_contains(OSError, match="Invalid argument")


def test_client_that_resets_its_connection_before_accept_is_ignored():
    async def scenario():
        async with served_gateway("http://127.0.0.1:9") as served:
            for _ in range(20):
                client = socket.create_connection(("127.0.0.1", served.port))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            later_client = await served.connect()
            later_client.send_request(key="another")
            assert (await later_client.read_response())[0] == 401
            assert not served.serving.done()

    run(scenario)
