"""A gateway whose host has lost contact with the server sends nothing after the lease has expired."""

import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from doubles.egress_host import HOST
from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway import limits
from sandbox.gateway.communication_lease import CommunicationLease, LeasedSocket, LeaseExpiredError, seconds_since_boot
from sandbox.gateway.egress import connection
from sandbox.gateway.tcp_connections import OutboundConnections
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules

WRITTEN_BYTES = 32 * 1024**2


class FakeClock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return FakeClock()


@asynccontextmanager
async def listening(handle):
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def answer(reader, writer):
    """Respond to each model request on a connection."""
    while await reader.readuntil(b"\r\n\r\n"):
        await reader.readexactly(2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def test_renewal_with_an_earlier_deadline_does_not_shorten_the_lease(clock):
    lease = CommunicationLease(10, clock)
    lease.renew(30)
    lease.renew(20)
    assert lease.seconds_left == 30
    clock.seconds = 30
    assert not lease.is_valid


async def test_expired_lease_is_valid_again_after_a_renewal(clock):
    lease = CommunicationLease(10, clock)
    await asyncio.wait_for(lease.wait_until_valid(), 1)
    clock.seconds = 10
    waiting = asyncio.ensure_future(lease.wait_until_valid())
    await asyncio.sleep(0)
    lease.renew(5)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    lease.renew(11)
    await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("method", ["send", "sendmsg", "connect"])
def test_socket_sends_nothing_after_the_deadline(clock, method):
    with socket.create_server(("127.0.0.1", 0)) as server, LeasedSocket() as connection:
        connection.lease = CommunicationLease(10, clock)
        arguments = {"send": b"data", "sendmsg": [b"data"], "connect": server.getsockname()}
        if method != "connect":
            connection.connect(server.getsockname())
            assert getattr(connection, method)(arguments[method]) == 4
        clock.seconds = 10
        with pytest.raises(LeaseExpiredError):
            getattr(connection, method)(arguments[method])


def test_asyncio_sends_only_through_the_methods_that_check_the_lease(clock, monkeypatch):
    """If asyncio called another method to send data, it could send under an expired lease.

    Written data is buffered until the peer reads.
    """
    sent = []
    monkeypatch.setattr(LeasedSocket, "apply_lease", lambda _: sent.append(1))

    async def scenario():
        received = bytearray()

        async def read(reader, _):
            while data := await reader.read(65536):
                received.extend(data)

        async with listening(read) as port:
            stream = await OutboundConnections(CommunicationLease(10, clock)).open("127.0.0.1", port)
            before = len(sent)
            stream.write(b"x" * (8 << 20))
            await wait_until(lambda: len(received) == 8 << 20)
            assert len(sent) > before + 1
            stream.abort()

    run(scenario)


def test_buffered_data_is_not_sent_after_the_deadline(clock):
    async def scenario():
        accepted = asyncio.get_running_loop().create_future()

        async def read_later(reader, _):
            accepted.set_result(reader)
            await asyncio.sleep(60)

        async with listening(read_later) as port:
            stream = await OutboundConnections(CommunicationLease(10, clock)).open("127.0.0.1", port)
            stream.write(b"x" * WRITTEN_BYTES)
            reader = await accepted
            await asyncio.sleep(0.1)
            clock.seconds = 10
            received_bytes = 0
            with suppress(ConnectionError):
                while data := await reader.read(1 << 20):
                    received_bytes += len(data)
            assert 0 < received_bytes < WRITTEN_BYTES
            stream.abort()

    run(scenario)


def test_model_request_before_the_first_renewal_is_held(clock, monkeypatch):
    """The agent starts a moment before the first renewal, so its first request must neither fail nor time out."""
    monkeypatch.setattr(limits, "HOLD_TIMEOUT_SECONDS", 0.1)

    async def scenario():
        async with listening(answer) as port:
            lease = CommunicationLease(0, clock)
            async with served_gateway(f"http://127.0.0.1:{port}", lease=lease) as served:
                client = await served.connect()
                client.send_request()
                response = asyncio.ensure_future(client.read_response())
                await asyncio.sleep(0.5)
                assert not response.done()
                lease.renew(20)
                assert (await response)[0] == 200

    run(scenario)


def test_model_requests_are_held_until_the_lease_is_renewed(clock):
    async def scenario():
        async with listening(answer) as port:
            lease = CommunicationLease(10, clock)
            async with served_gateway(f"http://127.0.0.1:{port}", lease=lease) as served:
                client = await served.connect()
                client.send_request()
                assert (await client.read_response())[0] == 200
                clock.seconds = 10
                held = await served.connect()
                held.send_request()
                response = asyncio.ensure_future(held.read_response())
                await asyncio.sleep(0.3)
                assert not response.done()
                lease.renew(20)
                assert (await response)[0] == 200

    run(scenario)


def test_held_model_request_is_answered_with_503_in_time(clock, monkeypatch):
    monkeypatch.setattr(limits, "HOLD_TIMEOUT_SECONDS", 0.1)

    async def scenario():
        async with served_gateway("http://127.0.0.1:9", lease=CommunicationLease(10, clock)) as served:
            client = await served.connect()
            await asyncio.sleep(0.1)
            clock.seconds = 10
            client.send_request()
            status, _, message = await client.read_error()
            assert (status, message.startswith("This host has lost contact")) == (503, True)

    run(scenario)


def test_expiry_resets_tunnels_and_a_renewal_allows_new_ones(clock, monkeypatch):
    """Each connection is reset, so the kernel sends no more data when the network recovers."""

    async def scenario():
        endings = []

        async def hold(reader, writer):
            writer.write(b"hello")
            try:
                await reader.read()
            except ConnectionResetError:
                endings.append("reset")
            else:
                endings.append("end")
            finally:
                writer.close()

        async with listening(hold) as port:
            lease = CommunicationLease(10, clock)
            rules = GatewayRules(EgressRules((EgressRule(HOST, (port,)),), has_outbound_mode=True))
            monkeypatch.setattr(
                connection, "_resolve", lambda host, **_: {"127.0.0.1" if host == HOST else "127.0.0.9"}
            )
            async with served_gateway(
                "http://127.0.0.9:9", rules, lease=lease, address_policy=lambda _: True
            ) as served:
                first = await open_tunnel(served, port)
                assert await first.read_exactly(5) == b"hello"
                clock.seconds = 10
                await wait_until(lambda: endings == ["reset"])
                assert b" 503 " in await (await connect_to(served, port)).read_until(b"\r\n\r\n")
                lease.renew(20)
                second = await open_tunnel(served, port)
                assert await second.read_exactly(5) == b"hello"

    run(scenario)


async def connect_to(served, port):
    client = await served.connect(served.listeners.proxy.getsockname()[1])
    client.writer.write(f"CONNECT {HOST}:{port} HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode())
    return client


async def open_tunnel(served, port):
    client = await connect_to(served, port)
    assert b" 200 " in await client.read_until(b"\r\n\r\n")
    return client


SENDER = """
import asyncio, sys
from sandbox.gateway.communication_lease import CommunicationLease, seconds_since_boot
from sandbox.gateway.tcp_connections import OutboundConnections

async def main():
    lease = CommunicationLease(seconds_since_boot() + float(sys.argv[2]))
    stream = await OutboundConnections(lease).open("127.0.0.1", int(sys.argv[1]))
    while True:
        stream.write(b"x" * 65536)
        await asyncio.sleep(0)

asyncio.run(main())
"""


def test_kernel_ends_a_connection_whose_data_is_not_acknowledged_at_the_deadline():
    """The process may be stopped, so only the kernel can prevent the data from being sent when the peer reads."""
    with socket.create_server(("127.0.0.1", 0)) as server, LeasedSocket() as connection:
        connection.lease = CommunicationLease(seconds_since_boot() + 1.0)
        connection.connect(server.getsockname())
        connection.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connection.send(bytes(1 << 20))
        deadline = time.monotonic() + 10
        while (error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert error == errno.ETIMEDOUT


def test_renewal_extends_the_deadline_of_data_that_was_sent_earlier():
    """A host that pauses for a moment must not lose a connection whose lease is valid."""
    with socket.create_server(("127.0.0.1", 0)) as server, LeasedSocket() as connection:
        connection.lease = lease = CommunicationLease(seconds_since_boot() + 1.0)
        connection.connect(server.getsockname())
        connection.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connection.send(bytes(1 << 20))
        lease.renew(seconds_since_boot() + 60)
        time.sleep(2.5)  # without a renewal, the kernel ends the connection after this time; see above
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        accepted, _ = server.accept()
        with accepted:
            assert read_buffered(accepted) > 0


def test_resumed_process_sends_nothing_after_the_deadline():
    """The process has written more than the kernel accepted, and asyncio would send the rest once the peer reads."""
    with stopped_sender(lease_seconds=4) as (process, connection):
        wait_until_the_kernel_ends_the_connection(connection.getpeername()[1])
        assert read_buffered(connection) > 0
        os.kill(process.pid, signal.SIGCONT)
        assert read_buffered(connection) == 0


def test_resumed_process_with_a_valid_lease_continues_to_send():
    """The control: the same process sends the rest if its lease is still valid."""
    with stopped_sender(lease_seconds=60) as (process, connection):
        read_buffered(connection)
        os.kill(process.pid, signal.SIGCONT)
        assert connection.recv(1) == b"x"


@contextmanager
def stopped_sender(lease_seconds):
    """Yield a stopped process that has sent data, and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(server.getsockname()[1]), str(lease_seconds)]
        with subprocess.Popen([sys.executable, "-c", SENDER, *arguments], stderr=subprocess.DEVNULL) as process:
            try:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    assert connection.recv(1) == b"x"
                    wait_until_the_kernel_accepts_no_more(connection.getpeername()[1])
                    os.kill(process.pid, signal.SIGSTOP)
                    yield process, connection
            finally:
                process.kill()


def wait_until_the_kernel_accepts_no_more(port):
    """Wait until the queue of unsent data has stopped growing, so the process is not sending at this moment."""
    deadline = time.monotonic() + 20
    before = None
    while (queued := queued_bytes(port)) == 0 or queued != before:
        assert time.monotonic() < deadline
        before = queued
        time.sleep(0.2)


def wait_until_the_kernel_ends_the_connection(port):
    """Wait until no connection from this port is listed. The kernel's timer can be late on a busy machine."""
    deadline = time.monotonic() + 20
    while queued_bytes(port) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def queued_bytes(port):
    """Return the number of bytes that the kernel has not sent yet; None if there is no connection from this port."""
    connection = rf"^ *\d+: 0100007F:{port:04X} [0-9A-F:]+ 01 ([0-9A-F]+):"
    found = re.search(connection, Path("/proc/net/tcp").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else None


def read_buffered(connection):
    """Read what the kernel has buffered on both sides; return the number of bytes."""
    received = 0
    connection.settimeout(0.5)
    with suppress(TimeoutError, ConnectionError):
        while data := connection.recv(1 << 20):
            received += len(data)
    connection.settimeout(5)
    return received
