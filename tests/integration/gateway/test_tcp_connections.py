"""The kernel's buffers for a connection to a host are bounded, even if the peer was fast before it stalled."""

import asyncio
import fcntl
import os
import socket
import struct
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from doubles.egress_host import HOST
from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway.egress import connection
from sandbox.gateway.limits import (
    FULL_SIZE_BUFFER_CONNECTIONS_MAX,
    OUTBOUND_RECEIVE_BUFFER_BYTES,
    REDUCED_BUFFER_BYTES,
    UNSENT_BYTES_MAX,
)
from sandbox.gateway.tcp_connections import OutboundConnections
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

SO_MEMINFO, SIOCOUTQNSD = 55, 0x894B
FAST_BYTES = 48 * 1024 * 1024
MEBIBYTE = 1024 * 1024
TUNNELS = 64


async def _connected_streams(serve_client):
    server = await asyncio.start_server(serve_client, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport = await OutboundConnections().open("127.0.0.1", port)
    return server, transport, transport._writer.get_extra_info("socket")


async def _wait_until_stable(measure):
    last = -1
    while last != (last := measure()):
        await asyncio.sleep(0.3)
    return last


@pytest.mark.skipif(os.getuid() != 0, reason="only root may set the size of a receive buffer")
def test_unread_data_from_a_host_is_limited_to_one_receive_buffer():
    async def flood(_, writer):
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    async def scenario():
        server, transport, connection = await _connected_streams(flood)
        received = 0
        while received < FAST_BYTES:
            received += len(await transport.read())
        transport._writer.transport.pause_reading()
        # On a fast network with a long delay, the kernel would enlarge the buffer if its size were not fixed.
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * OUTBOUND_RECEIVE_BUFFER_BYTES

        def buffered():
            return struct.unpack("9I", connection.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0]

        assert 0 < await _wait_until_stable(buffered) <= 2 * OUTBOUND_RECEIVE_BUFFER_BYTES + 256 * 1024
        transport.abort()
        server.close()

    run(scenario)


def test_unsent_data_to_a_stalled_host_is_limited():
    async def read_for_a_while(reader, _):
        await reader.readexactly(FAST_BYTES)
        await asyncio.sleep(600)

    async def scenario():
        server, transport, connection = await _connected_streams(read_for_a_while)

        async def send():
            while True:
                transport.write(bytes(64 * 1024))
                await transport.drain()

        sender = asyncio.create_task(send())

        def unsent():
            return struct.unpack("I", fcntl.ioctl(connection, SIOCOUTQNSD, bytes(4)))[0]

        await asyncio.sleep(1)
        assert 0 < await _wait_until_stable(unsent) <= UNSENT_BYTES_MAX + 256 * 1024
        sender.cancel()
        transport.abort()
        server.close()

    run(scenario)


@asynccontextmanager
async def gateway_with_flooding_host(monkeypatch):
    """Yield a gateway, and the port of an upstream host that sends data endlessly."""

    async def flood(reader, writer):
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readexactly(1)
            while True:
                writer.write(bytes(MEBIBYTE))
                await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(flood, "127.0.0.1", 0, backlog=TUNNELS)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setattr(connection, "_resolve", lambda host, **_: {"127.0.0.1" if host == HOST else "127.0.0.9"})
    rules = GatewayRules(egress=EgressRules((EgressRule(HOST, (port,)),), has_outbound_mode=True))
    try:
        async with served_gateway("http://127.0.0.9:9", rules, address_policy=lambda _: True) as served:
            yield served, port
    finally:
        server.close()


async def tunnel(served, port):
    client = await served.connect(served.listeners.proxy.getsockname()[1])
    client.writer.transport.pause_reading()
    client.writer.write(f"CONNECT {HOST}:{port} HTTP/1.1\r\nHost: {HOST}\r\n\r\n\2".encode())
    return client


def connections_of(*, local_port=None, remote_port=None):
    """Yield the connections of this process with this local or remote port."""
    for path in Path("/proc/self/fd").iterdir():
        if not path.is_socket():
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as sock:
            is_tcp = (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
            if is_tcp and (sock.getpeername()[1] == remote_port or sock.getsockname()[1] == local_port):
                yield sock


def buffered_bytes(connections):
    """Return the number of received bytes and the number of unsent bytes in the kernel's buffers."""
    counters = [struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)) for sock in connections]
    return sum(sock[0] for sock in counters), sum(sock[5] for sock in counters)


def test_connections_of_a_stalled_task_use_little_kernel_memory(monkeypatch):
    async def scenario():
        async with gateway_with_flooding_host(monkeypatch) as (served, port):
            for _ in range(TUNNELS):
                await tunnel(served, port)
            proxy_port = served.listeners.proxy.getsockname()[1]

            def buffered():
                received_bytes, _ = buffered_bytes(connections_of(remote_port=port))
                _, unsent_bytes = buffered_bytes(connections_of(local_port=proxy_port))
                return received_bytes, unsent_bytes

            from_hosts_bytes, to_sandbox_bytes = await _wait_until_stable(buffered)
            assert MEBIBYTE < from_hosts_bytes < 80 * MEBIBYTE
            assert MEBIBYTE < to_sandbox_bytes < 30 * MEBIBYTE

    run(scenario)


def test_first_concurrent_host_connections_have_full_buffers(monkeypatch):
    async def scenario():
        async with gateway_with_flooding_host(monkeypatch) as (served, port):
            proxy_port = served.listeners.proxy.getsockname()[1]

            def count_reduced_buffers():
                sides = [connections_of(remote_port=port), connections_of(local_port=proxy_port)]
                sizes = [[sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in side] for side in sides]
                return [(len(side), side.count(2 * REDUCED_BUFFER_BYTES)) for side in sizes]

            for _ in range(2):
                clients = [await tunnel(served, port) for _ in range(FULL_SIZE_BUFFER_CONNECTIONS_MAX + 4)]
                assert (
                    await _wait_until_stable(count_reduced_buffers) == [(FULL_SIZE_BUFFER_CONNECTIONS_MAX + 4, 4)] * 2
                )
                for client in clients:
                    client.abort()
                assert await _wait_until_stable(count_reduced_buffers) == [(0, 0)] * 2

    run(scenario)


def test_first_concurrent_model_connections_have_full_buffers():
    async def scenario():
        heads = []

        async def never_respond(reader, writer):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.read()
            writer.transport.abort()

        server = await asyncio.start_server(never_respond, "127.0.0.1", 0, backlog=TUNNELS)
        port = server.sockets[0].getsockname()[1]
        async with served_gateway(f"http://127.0.0.1:{port}") as served:
            for _ in range(FULL_SIZE_BUFFER_CONNECTIONS_MAX + 4):
                (await served.connect()).send_request(b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}')
            await wait_until(lambda: len(heads) == FULL_SIZE_BUFFER_CONNECTIONS_MAX + 4)
            sizes = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in connections_of(remote_port=port)]
            assert sizes.count(2 * REDUCED_BUFFER_BYTES) == 4
        server.close()

    run(scenario)
