"""From inside an isolated sandbox nothing but the model answers; each try is refused and told."""

import asyncio
import socket
import ssl
from contextlib import contextmanager

import pytest

from doubles.served_gateway import run, served_gateway
from sandbox.gateway.dns import DnsResponder
from sandbox.gateway.egress.policy import ISOLATED
from sandbox.model.events import EgressDenied, ErrorReported

NOBODY = "http://127.0.0.1:9"


def query(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\xab\xcd\x01\x00\x00\x01" + bytes(6) + labels + b"\0\0\x01\0\x01"


def test_the_proxy_refuses_to_connect_anywhere():
    async def story():
        async with served_gateway(NOBODY) as served:
            client = await served.connect(served.listeners.proxy.getsockname()[1])
            client.writer.write(b"CONNECT files.example.org:443 HTTP/1.1\r\nHost: files.example.org\r\n\r\n")
            received = await client.rest()
            assert received.startswith(b"HTTP/1.1 403 ")
            assert ISOLATED.encode() in received
            assert served.told == [EgressDenied("files.example.org", 443, ISOLATED)]

    run(story)


def test_a_program_that_ignores_the_proxy_is_refused_on_port_80():
    async def story():
        async with served_gateway(NOBODY) as served:
            client = await served.connect(served.listeners.transparent[80].getsockname()[1])
            client.writer.write(b"GET /a HTTP/1.1\r\nHost: files.example.org\r\n\r\n" + b"x" * 200_000)
            assert (await client.rest()).startswith(b"HTTP/1.1 403 ")
            assert served.told == [EgressDenied("files.example.org", 80, ISOLATED)]

    run(story)


def test_a_tls_client_finds_nobody_and_its_name_is_told():
    async def story():
        async with served_gateway(NOBODY) as served:
            port = served.listeners.transparent[443].getsockname()[1]
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(
                    "127.0.0.1", port, ssl=ssl.create_default_context(), server_hostname="files.example.org"
                )
            assert served.told == [EgressDenied("files.example.org", 443, ISOLATED)]

    run(story)


def test_a_tls_client_that_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr("sandbox.gateway.limits.HEAD_SECONDS", 0.2)

    async def story():
        async with served_gateway(NOBODY) as served:
            client = await served.connect(served.listeners.transparent[443].getsockname()[1])
            assert await client.rest() == b""
            assert served.told == [EgressDenied("127.0.0.1", 443, ISOLATED)]

    run(story)


@contextmanager
def resolver_of(served):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.setblocking(False)
        resolver.connect(served.listeners.dns_udp.getsockname())
        yield resolver


def test_no_name_exists_over_udp():
    async def story():
        async with served_gateway(NOBODY) as served:
            loop = asyncio.get_running_loop()
            with resolver_of(served) as resolver:
                for scrap in (b"", b"\0", b"\xff" * 9000):
                    await loop.sock_sendall(resolver, scrap)
                await loop.sock_sendall(resolver, query("files.example.org"))
                answers = [await loop.sock_recv(resolver, 4096) for _ in range(1)]
            assert answers[0][:2] == b"\xab\xcd"
            assert answers[0][3] & 0x0F == 3
            assert served.told == [EgressDenied("files.example.org", 53, ISOLATED)]

    run(story)


def test_a_query_that_fails_inside_ends_alone(monkeypatch):
    answer = DnsResponder.respond

    def breaks_at_some(self, asked):
        if b"breaks" in asked:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "a mistake of ours")
        return answer(self, asked)

    monkeypatch.setattr(DnsResponder, "respond", breaks_at_some)

    async def story():
        async with served_gateway(NOBODY) as served:
            loop = asyncio.get_running_loop()
            with resolver_of(served) as resolver:
                await loop.sock_sendall(resolver, query("breaks.example.org"))
                await loop.sock_sendall(resolver, query("files.example.org"))
                assert (await asyncio.wait_for(loop.sock_recv(resolver, 4096), 10))[3] & 0x0F == 3
            assert [trouble.error for trouble in served.of(ErrorReported)] == ["gateway_error"]

    run(story)


def test_no_name_exists_over_tcp():
    async def story():
        async with served_gateway(NOBODY) as served:
            client = await served.connect(served.listeners.dns_tcp.getsockname()[1])
            asked = query("files.example.org")
            for _ in range(2):
                client.writer.write(len(asked).to_bytes(2) + asked)
                answer = await client.exactly(int.from_bytes(await client.exactly(2)))
                assert answer[3] & 0x0F == 3
            client.writer.write_eof()
            await client.rest()

    run(story)


def test_a_flood_of_name_queries_leaves_the_runner_and_its_journal_in_peace():
    async def story():
        async with served_gateway(NOBODY) as served:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
                flood.connect(served.listeners.dns_udp.getsockname())
                for _ in range(2000):
                    flood.send(query("files.example.org"))
                await asyncio.sleep(0.3)
            client = await served.connect()
            client.ask(key="wrong")
            assert (await client.error())[0] == 401
            await served.stop()
            assert len(served.of(EgressDenied)) <= 60
            assert served.of(ErrorReported)[-1].error == "egress_denials_dropped"

    run(story)
