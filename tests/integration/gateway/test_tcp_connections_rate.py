"""New outbound connections and lookups of each task are rate-limited: tasks share the machine's ports and resolver."""

import asyncio
import time

import pytest

from doubles.egress_host import HOST
from doubles.served_gateway import GATEWAY_KEY, run, served_gateway
from sandbox.gateway import limits
from sandbox.gateway.egress import connection
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

BURST, PER_SECOND, TOTAL = 5, 10, 15
REQUEST = b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Api-Key: %s\r\nContent-Length: 2\r\n\r\n{}"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"


@pytest.fixture
def low_connection_rates(monkeypatch):
    for name in ("EGRESS", "MODEL"):
        monkeypatch.setattr(limits, f"{name}_CONNECTIONS_BURST", BURST)
        monkeypatch.setattr(limits, f"{name}_CONNECTIONS_PER_SECOND", PER_SECOND)
    monkeypatch.setattr(connection, "_resolve", lambda host, **_: {"127.0.0.1" if host == HOST else "127.0.0.9"})


def serve(arrivals, response=RESPONSE):
    """Respond to each request and record each connection."""

    async def serve_client(reader, writer):
        arrivals.append(time.monotonic())
        try:
            while b"\r\n\r\n" in await reader.read(65536):
                writer.write(response)
        finally:
            writer.transport.abort()

    return asyncio.start_server(serve_client, "127.0.0.1", 0)


async def send_request(reader, writer, port):
    writer.write(REQUEST % (port, GATEWAY_KEY.encode()))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await reader.readexactly(2)


def is_rate_limited(arrivals):
    """Return whether the connections beyond the burst arrived no faster than the rate limit allows."""
    assert len(arrivals) == TOTAL
    return arrivals[-1] - arrivals[0] >= (TOTAL - BURST) / PER_SECOND / 2


def test_new_model_connections_are_rate_limited_and_requests_are_not(low_connection_rates):
    async def scenario():
        arrivals = []
        server = await serve(arrivals)
        async with served_gateway(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as served:
            for _ in range(TOTAL):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                await send_request(reader, writer, served.port)
                writer.transport.abort()
            assert is_rate_limited(arrivals)
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            for _ in range(10 * TOTAL):
                await send_request(reader, writer, served.port)
            assert len(arrivals) == TOTAL + 1
            writer.transport.abort()
        server.close()

    run(scenario)


def test_new_host_connections_are_rate_limited_and_all_succeed(low_connection_rates):
    async def scenario():
        arrivals = []
        server = await serve(arrivals)
        port = server.sockets[0].getsockname()[1]
        rules = GatewayRules(egress=EgressRules((EgressRule(HOST, (port,)),), has_outbound_mode=True))
        async with served_gateway("http://127.0.0.9:9", rules, address_policy=lambda _: True) as served:
            proxy = served.listeners.proxy.getsockname()[1]

            async def fetch():
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
                writer.write(f"GET http://{HOST}:{port}/ HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                writer.transport.abort()

            await asyncio.gather(*(fetch() for _ in range(TOTAL)))
        assert is_rate_limited(arrivals)
        server.close()

    run(scenario)


@pytest.mark.parametrize(
    ("addresses", "status"), [(None, 502), ({"10.0.0.1"}, 403)], ids=["does-not-resolve", "private-address"]
)
def test_lookups_without_a_connection_are_rate_limited(low_connection_rates, monkeypatch, addresses, status):
    """A task could otherwise send hundreds of queries per second to the resolver that all tasks share."""
    lookups = []

    def resolve(host, **_):
        if host != HOST:
            return {"127.0.0.9"}
        lookups.append(time.monotonic())
        if addresses is None:
            raise OSError
        return addresses

    monkeypatch.setattr(connection, "_resolve", resolve)

    async def scenario():
        rules = GatewayRules(egress=EgressRules((EgressRule(HOST),), has_outbound_mode=True))
        async with served_gateway("http://127.0.0.9:9", rules) as served:
            proxy = served.listeners.proxy.getsockname()[1]

            async def connect():
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
                writer.write(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 %d" % status)
                writer.transport.abort()

            await asyncio.gather(*(connect() for _ in range(TOTAL)))
        assert is_rate_limited(lookups)

    run(scenario)
