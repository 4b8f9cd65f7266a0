"""What the kernel holds of one connection to a host is bounded, also where it was fast before it stalled."""

import asyncio
import fcntl
import os
import socket
import struct
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from doubles.remote_host import HOST
from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway.egress import dialer
from sandbox.gateway.limits import (
    NARROW_BUFFER_BYTES,
    UNSENT_BYTES_MAX,
    UPSTREAM_RECEIVE_BYTES_MAX,
    WIDE_CONNECTIONS_MAX,
)
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

SO_MEMINFO, SIOCOUTQNSD = 55, 0x894B
FAST_BYTES = 48 * 1024 * 1024
MEBIBYTE = 1024 * 1024
TUNNELS = 64


async def _connected(attend):
    server = await asyncio.start_server(attend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    line = await dialer._connect("host", port, [ip_address("127.0.0.1")])
    return server, line, line._writer.get_extra_info("socket")


async def _settled(figure):
    last = -1
    while last != (last := figure()):
        await asyncio.sleep(0.3)
    return last


@pytest.mark.skipif(os.getuid() != 0, reason="only root may ask for the size of a receive buffer")
def test_a_host_fills_no_more_than_one_buffer_of_a_task_that_stops_reading():
    async def flood(_, writer):
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    async def story():
        server, line, connected = await _connected(flood)
        received = 0
        while received < FAST_BYTES:
            received += len(await line.read())
        line._writer.transport.pause_reading()
        # A fast network with a long delay makes the kernel enlarge the buffer, unless it has a fixed size.
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * UPSTREAM_RECEIVE_BYTES_MAX

        def held():
            return struct.unpack("9I", connected.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0]

        assert 0 < await _settled(held) <= 2 * UPSTREAM_RECEIVE_BYTES_MAX + 256 * 1024
        line.abort()
        server.close()

    run(story)


def test_a_task_leaves_little_unsent_at_a_host_that_stops_reading():
    async def read_for_a_while(reader, _):
        await reader.readexactly(FAST_BYTES)
        await asyncio.sleep(600)

    async def story():
        server, line, connected = await _connected(read_for_a_while)

        async def send():
            while True:
                line.write(bytes(64 * 1024))
                await line.drain()

        sending = asyncio.create_task(send())

        def unsent():
            return struct.unpack("I", fcntl.ioctl(connected, SIOCOUTQNSD, bytes(4)))[0]

        await asyncio.sleep(1)
        assert 0 < await _settled(unsent) <= UNSENT_BYTES_MAX + 256 * 1024
        sending.cancel()
        line.abort()
        server.close()

    run(story)


@asynccontextmanager
async def flooding_host(monkeypatch):
    """A gateway, and the port of a host behind it that sends without end."""

    async def flood(reader, writer):
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readexactly(1)
            while True:
                writer.write(bytes(MEBIBYTE))
                await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(flood, "127.0.0.1", 0, backlog=TUNNELS)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setattr(dialer, "_resolve", lambda host: {"127.0.0.1" if host == HOST else "127.0.0.9"})
    rules = GatewayRules(egress=EgressRules((EgressRule(HOST, (port,)),), is_outbound=True))
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


def ends(*, own=None, peer=None):
    """This process's connections with these ports."""
    for path in Path("/proc/self/fd").iterdir():
        if not path.is_socket():
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as one:
            is_tcp = (one.family, one.type) == (socket.AF_INET, socket.SOCK_STREAM)
            if is_tcp and (one.getpeername()[1] == peer or one.getsockname()[1] == own):
                yield one


def held_by(connections):
    """What was received and what is to be sent, in bytes."""
    told = [struct.unpack("9I", one.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)) for one in connections]
    return sum(one[0] for one in told), sum(one[5] for one in told)


def test_the_connections_of_a_task_that_reads_nothing_hold_little_of_the_machines_memory(monkeypatch):
    async def story():
        async with flooding_host(monkeypatch) as (served, port):
            for _ in range(TUNNELS):
                await tunnel(served, port)
            inside = served.listeners.proxy.getsockname()[1]

            def held():
                return held_by(ends(peer=port))[0], held_by(ends(own=inside))[1]

            from_hosts, to_inside = await _settled(held)
            assert MEBIBYTE < from_hosts < 80 * MEBIBYTE
            assert MEBIBYTE < to_inside < 30 * MEBIBYTE

    run(story)


def test_a_few_connections_at_once_have_wide_buffers_and_so_do_those_after_them(monkeypatch):
    async def story():
        async with flooding_host(monkeypatch) as (served, port):
            inside = served.listeners.proxy.getsockname()[1]

            def narrow():
                sides = [ends(peer=port), ends(own=inside)]
                sizes = [[one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for one in side] for side in sides]
                return [(len(side), side.count(2 * NARROW_BUFFER_BYTES)) for side in sizes]

            for _ in range(2):
                clients = [await tunnel(served, port) for _ in range(WIDE_CONNECTIONS_MAX + 4)]
                assert await _settled(narrow) == [(WIDE_CONNECTIONS_MAX + 4, 4)] * 2
                for client in clients:
                    client.leave()
                assert await _settled(narrow) == [(0, 0)] * 2

    run(story)


def test_a_few_connections_to_the_model_have_wide_buffers_too():
    async def story():
        asked = []

        async def keep_waiting(reader, writer):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.read()
            writer.transport.abort()

        server = await asyncio.start_server(keep_waiting, "127.0.0.1", 0, backlog=TUNNELS)
        port = server.sockets[0].getsockname()[1]
        async with served_gateway(f"http://127.0.0.1:{port}") as served:
            for _ in range(WIDE_CONNECTIONS_MAX + 4):
                (await served.connect()).ask(b'{"model":"claude-haiku-4-5","max_tokens":1,"messages":[]}')
            await until_true(lambda: len(asked) == WIDE_CONNECTIONS_MAX + 4)
            sizes = [one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for one in ends(peer=port)]
            assert sizes.count(2 * NARROW_BUFFER_BYTES) == 4
        server.close()

    run(story)
