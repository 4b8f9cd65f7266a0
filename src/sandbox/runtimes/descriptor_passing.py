"""Passes memfds to a sandbox, and reads its output without accepting descriptors that programs pass."""

import asyncio
import os
import socket
import threading
from contextlib import suppress


def create_memfd(name: str, content: bytes) -> int:
    """Create a memfd with this content, positioned at its start. The caller closes it."""
    descriptor = os.memfd_create(name)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


_BUFFER_BYTES = 256 * 1024


_SO_PASSRIGHTS = 83


def refuse_passed_descriptors(receiver: socket.socket) -> bool:
    """Make the kernel refuse to pass files (SCM_RIGHTS) to a Unix socket. Returns False before Linux 6.16.

    If the receiver does not accept the files, the kernel closes them in the thread that reads or closes the socket. A
    program inside could pass a connection that takes arbitrarily long to close (SO_LINGER).
    """
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


class _ClosingProtocol(asyncio.StreamReaderProtocol):
    """Closes its transport at the end of the stream, instead of keeping the write direction open."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def open_reader(source: socket.socket) -> tuple[asyncio.StreamReader, asyncio.Transport]:
    """Return a reader for the socket and the transport to abort it. Takes ownership of the socket.

    Urgent data (MSG_OOB) is read like other data. Otherwise, each urgent byte would wake this process up and be dropped
    without being counted.
    """
    source.shutdown(socket.SHUT_WR)
    source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if not refuse_passed_descriptors(source):
        source = _relay_in_thread(source)
    reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: _ClosingProtocol(reader), sock=source)
    return reader, transport


def _relay_in_thread(source: socket.socket) -> socket.socket:
    """Return a socket with the data of `source` and without files. Only a daemon thread reads and closes `source`."""
    reader, writer = socket.socketpair()

    def relay() -> None:
        with source, writer, suppress(OSError):
            while data := source.recv(_BUFFER_BYTES):
                writer.sendall(data)

    threading.Thread(target=relay, name="output", daemon=True).start()
    return reader
