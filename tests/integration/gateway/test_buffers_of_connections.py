"""What the kernel holds of one connection to a host is bounded, also where it was fast before it stalled."""

import asyncio
import fcntl
import os
import socket
import struct
from ipaddress import ip_address

import pytest

from doubles.served_gateway import run
from sandbox.gateway import outward
from sandbox.gateway.limits import UPSTREAM_RECEIVE_BYTES_MAX, UPSTREAM_UNSENT_BYTES_MAX

SO_MEMINFO, SIOCOUTQNSD = 55, 0x894B
FAST_BYTES = 48 * 1024 * 1024


async def _connected(attend):
    server = await asyncio.start_server(attend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    line = await outward._connect("host", port, [ip_address("127.0.0.1")])
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
        line.cut()
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
        assert 0 < await _settled(unsent) <= UPSTREAM_UNSENT_BYTES_MAX + 256 * 1024
        sending.cancel()
        line.cut()
        server.close()

    run(story)
