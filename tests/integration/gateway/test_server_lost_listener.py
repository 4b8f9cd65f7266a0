"""A gateway whose listener is gone says so, instead of waiting for ever for connections that cannot come."""

import asyncio
import socket

import pytest

from doubles.served_gateway import run, served_gateway


@pytest.mark.parametrize("door", ["model", "proxy", "dns_tcp"])
def test_serving_ends_with_an_error(door):
    async def story():
        async with served_gateway("http://127.0.0.1:9") as served:
            # What the kernel leaves of a listener that it was told to destroy: one that does not listen.
            getattr(served.listeners, door).shutdown(socket.SHUT_RDWR)
            await asyncio.wait({served.serving}, timeout=10)
            assert served.serving.done()

    with pytest.raises(ExceptionGroup) as raised:
        run(story)
    assert raised.group_contains(OSError, match="Invalid argument")


def test_a_client_that_goes_away_before_it_is_let_in_costs_nothing():
    async def story():
        async with served_gateway("http://127.0.0.1:9") as served:
            for _ in range(20):
                client = socket.create_connection(("127.0.0.1", served.port))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            answered = await served.connect()
            answered.ask(key="another")
            assert (await answered.answer())[0] == 401
            assert not served.serving.done()

    run(story)
