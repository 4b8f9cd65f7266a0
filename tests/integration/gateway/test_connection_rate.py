"""A task opens connections to outside no faster than at a rate: each keeps a port of the machine, which all share."""

import asyncio
import time

import pytest

from doubles.remote_host import HOST
from doubles.served_gateway import TASK_KEY, run, served_gateway
from sandbox.gateway import limits
from sandbox.gateway.egress import dialer
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

AT_ONCE, PER_SECOND, WANTED = 5, 10, 15
QUESTION = b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Api-Key: %s\r\nContent-Length: 2\r\n\r\n{}"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"


@pytest.fixture
def rates(monkeypatch):
    for name in ("HOST", "MODEL"):
        monkeypatch.setattr(limits, f"{name}_CONNECTIONS_AT_ONCE", AT_ONCE)
        monkeypatch.setattr(limits, f"{name}_CONNECTIONS_PER_SECOND", PER_SECOND)
    monkeypatch.setattr(dialer, "_resolve", lambda host: {"127.0.0.1" if host == HOST else "127.0.0.9"})


def playing(came, answer=ANSWER):
    """Answers each request, and tells of each connection."""

    async def attend(reader, writer):
        came.append(time.monotonic())
        try:
            while b"\r\n\r\n" in await reader.read(65536):
                writer.write(answer)
        finally:
            writer.transport.abort()

    return asyncio.start_server(attend, "127.0.0.1", 0)


async def ask(reader, writer, port):
    writer.write(QUESTION % (port, TASK_KEY.encode()))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await reader.readexactly(2)


def at_the_rate(came):
    """The first are at once; those behind them come one by one."""
    assert len(came) == WANTED
    return came[-1] - came[0] >= (WANTED - AT_ONCE) / PER_SECOND - 0.05


def test_new_connections_to_the_model_wait_and_requests_on_an_open_one_do_not(rates):
    async def story():
        came = []
        server = await playing(came)
        async with served_gateway(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as served:
            for _ in range(WANTED):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                await ask(reader, writer, served.port)
                writer.transport.abort()
            assert at_the_rate(came)
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            for _ in range(10 * WANTED):
                await ask(reader, writer, served.port)
            assert len(came) == WANTED + 1
            writer.transport.abort()
        server.close()

    run(story)


def test_new_connections_to_hosts_wait_and_each_comes_through(rates):
    async def story():
        came = []
        server = await playing(came)
        port = server.sockets[0].getsockname()[1]
        rules = GatewayRules(egress=EgressRules((EgressRule(HOST, (port,)),), is_outbound=True))
        async with served_gateway("http://127.0.0.9:9", rules, address_policy=lambda _: True) as served:
            proxy = served.listeners.proxy.getsockname()[1]

            async def fetch():
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
                writer.write(f"GET http://{HOST}:{port}/ HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                writer.transport.abort()

            await asyncio.gather(*(fetch() for _ in range(WANTED)))
        assert at_the_rate(came)
        server.close()

    run(story)
