"""An isolated sandbox can reach only the model. Every other connection is refused and reported."""

import asyncio
import socket
import ssl
from contextlib import contextmanager

import pytest

from doubles.served_gateway import run, served_gateway
from sandbox.gateway.egress.policy import ISOLATED_DENY_REASON
from sandbox.gateway.synthetic_dns import DnsResponder
from sandbox.model.events import EgressDenied, ErrorReported

UNUSED_UPSTREAM = "http://127.0.0.1:9"


def query(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\xab\xcd\x01\x00\x00\x01" + bytes(6) + labels + b"\0\0\x01\0\x01"


def test_proxy_refuses_all_hosts():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            client = await served.connect(served.listeners.proxy.getsockname()[1])
            client.writer.write(b"CONNECT files.example.org:443 HTTP/1.1\r\nHost: files.example.org\r\n\r\n")
            received = await client.read_to_end()
            assert received.startswith(b"HTTP/1.1 403 ")
            assert ISOLATED_DENY_REASON.encode() in received
            assert served.events == [EgressDenied("files.example.org", 443, ISOLATED_DENY_REASON)]

    run(scenario)


def test_request_on_transparent_port_80_is_denied():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            client = await served.connect(served.listeners.transparent[80].getsockname()[1])
            client.writer.write(b"GET /a HTTP/1.1\r\nHost: files.example.org\r\n\r\n" + b"x" * 200_000)
            assert (await client.read_to_end()).startswith(b"HTTP/1.1 403 ")
            assert served.events == [EgressDenied("files.example.org", 80, ISOLATED_DENY_REASON)]

    run(scenario)


def test_tls_connection_is_denied_and_its_server_name_is_reported():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            port = served.listeners.transparent[443].getsockname()[1]
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(
                    "127.0.0.1", port, ssl=ssl.create_default_context(), server_hostname="files.example.org"
                )
            assert served.events == [EgressDenied("files.example.org", 443, ISOLATED_DENY_REASON)]

    run(scenario)


def test_silent_tls_client_times_out(monkeypatch):
    monkeypatch.setattr("sandbox.gateway.limits.HEAD_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            client = await served.connect(served.listeners.transparent[443].getsockname()[1])
            assert await client.read_to_end() == b""
            assert served.events == [EgressDenied("127.0.0.1", 443, ISOLATED_DENY_REASON)]

    run(scenario)


@contextmanager
def resolver_of(served):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.setblocking(False)
        resolver.connect(served.listeners.dns_udp.getsockname())
        yield resolver


def test_udp_dns_query_returns_nxdomain():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            loop = asyncio.get_running_loop()
            with resolver_of(served) as resolver:
                for garbage in (b"", b"\0", b"\xff" * 9000):
                    await loop.sock_sendall(resolver, garbage)
                await loop.sock_sendall(resolver, query("files.example.org"))
                responses = [await loop.sock_recv(resolver, 4096) for _ in range(1)]
            assert responses[0][:2] == b"\xab\xcd"
            assert responses[0][3] & 0x0F == 3
            assert served.events == [EgressDenied("files.example.org", 53, ISOLATED_DENY_REASON)]

    run(scenario)


def test_exception_in_a_dns_query_affects_no_other_query(monkeypatch):
    respond = DnsResponder.respond

    def respond_or_fail(self, message):
        if b"breaks" in message:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "a bug")
        return respond(self, message)

    monkeypatch.setattr(DnsResponder, "respond", respond_or_fail)

    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            loop = asyncio.get_running_loop()
            with resolver_of(served) as resolver:
                await loop.sock_sendall(resolver, query("breaks.example.org"))
                await loop.sock_sendall(resolver, query("files.example.org"))
                assert (await asyncio.wait_for(loop.sock_recv(resolver, 4096), 10))[3] & 0x0F == 3
            assert [report.error for report in served.events_of(ErrorReported)] == ["gateway_error"]

    run(scenario)


def test_tcp_dns_query_returns_nxdomain():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            client = await served.connect(served.listeners.dns_tcp.getsockname()[1])
            message = query("files.example.org")
            for _ in range(2):
                client.writer.write(len(message).to_bytes(2) + message)
                response = await client.read_exactly(int.from_bytes(await client.read_exactly(2)))
                assert response[3] & 0x0F == 3
            client.writer.write_eof()
            await client.read_to_end()

    run(scenario)


def test_flood_of_dns_queries_does_not_fill_the_journal():
    async def scenario():
        async with served_gateway(UNUSED_UPSTREAM) as served:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
                flood.connect(served.listeners.dns_udp.getsockname())
                for _ in range(2000):
                    flood.send(query("files.example.org"))
                await asyncio.sleep(0.3)
            client = await served.connect()
            client.send_request(key="wrong")
            assert (await client.read_error())[0] == 401
            await served.stop()
            assert len(served.events_of(EgressDenied)) <= 60
            assert served.events_of(ErrorReported)[-1].error == "egress_denials_dropped"

    run(scenario)
