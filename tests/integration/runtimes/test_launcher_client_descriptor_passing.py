"""Reading output, and descriptors that programs pass with it."""

import asyncio
import errno
import os
import socket
import struct
import time
from contextlib import suppress

import pytest

from sandbox.runtimes import launcher_client
from sandbox.runtimes.launcher_client import open_reader


def send_urgently(sender: socket.socket, data: bytes) -> None:
    try:
        sender.send(data, socket.MSG_OOB)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this kernel has no urgent data in Unix sockets")


async def test_urgent_data_in_the_output_is_read_and_thus_counted():
    """If the kernel dropped it, each byte would wake the runner up without being charged to its CPU budget."""
    source, sender = socket.socketpair()
    reader, transport = await open_reader(source)
    with sender:
        async with asyncio.timeout(30):
            for number in range(10):
                send_urgently(sender, b"%d" % number)
                assert await reader.readexactly(1) == b"%d" % number
            sender.send(b"ordinary")
            sender.shutdown(socket.SHUT_WR)
            assert await reader.read() == b"ordinary"
    transport.abort()


_LINGER_SECONDS = 3


def _lingering_connection():
    """Return both ends of a connection with unsent data. Closing the first end takes `_LINGER_SECONDS`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _LINGER_SECONDS))
    client.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            client.send(bytes(65536))
    client.setblocking(True)  # a non-blocking connection does not linger
    return client, peer


async def test_passed_connection_that_closes_slowly_does_not_block_the_event_loop(monkeypatch):
    """Before Linux 6.16, the kernel passes files to the output. If nobody accepts a file, reading closes it."""
    monkeypatch.setattr(launcher_client, "refuse_passed_descriptors", lambda _: False)
    source, writer = socket.socketpair()
    client, peer = _lingering_connection()
    with writer, peer:
        socket.send_fds(writer, [b"passed"], [client.fileno()])
        writer.close()
        os.close(client.detach())
        started_at = time.monotonic()
        reader, transport = await open_reader(source)
        pauses = [await _pause_seconds() for _ in range(20)]
        assert max(pauses) < _LINGER_SECONDS / 2
        async with asyncio.timeout(30):
            assert await reader.read() == b"passed"
        assert time.monotonic() - started_at > _LINGER_SECONDS / 2  # closing the connection was slow
        transport.abort()


async def _pause_seconds():
    """Return for how long the event loop was busy with something else."""
    started_at = time.monotonic()
    await asyncio.sleep(0)
    return time.monotonic() - started_at


async def test_files_are_refused_if_the_kernel_can_refuse_them():
    source, writer = socket.socketpair()
    if not launcher_client.refuse_passed_descriptors(source):
        pytest.skip("Linux before 6.16 passes files")
    reader, transport = await open_reader(source)
    with writer:
        with pytest.raises(PermissionError):
            socket.send_fds(writer, [b"passed"], [writer.fileno()])
        writer.send(b"data")
    assert await reader.read() == b"data"
    transport.abort()
