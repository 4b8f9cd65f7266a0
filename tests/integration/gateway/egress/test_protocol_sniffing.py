"""Protocols other than TLS and HTTP are forwarded, but cannot carry TLS or HTTP to another host."""

import asyncio

import pytest

from doubles.egress_host import HOST, client_hello, gateway_with_egress_host, tunnel
from doubles.served_gateway import run, wait_until
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied

PORT = 5432
RULES = GatewayRules(egress=EgressRules((EgressRule(HOST, (PORT,)),)))
FORBIDDEN_REQUEST = b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


@pytest.mark.parametrize(
    "sent",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + FORBIDDEN_REQUEST,
        b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0" + FORBIDDEN_REQUEST,
        b"\0" + FORBIDDEN_REQUEST,
        FORBIDDEN_REQUEST.replace(b" ", b"\x1c", 1),
        b"\x15\3\1\0\2\1\0" + client_hello("other.example"),
    ],
)
@pytest.mark.parametrize("pause_seconds", [0, 0.002])
def test_prefix_does_not_hide_a_forbidden_request(monkeypatch, sent, pause_seconds):
    received = b""

    async def receive(reader, _):
        nonlocal received
        while data := await reader.read(1000):
            received += data

    async def scenario():
        async with gateway_with_egress_host(receive, monkeypatch, rules=RULES) as served:
            client = await tunnel(served, port=PORT)
            await client.read_until(b"\r\n\r\n")
            for byte in sent if pause_seconds else [sent]:
                client.writer.write(bytes([byte]) if pause_seconds else sent)
                await asyncio.sleep(pause_seconds)
            await wait_until(lambda: served.events_of(EgressDenied) != [])
            assert (served.events[0].host, served.events[0].port) == (HOST, PORT)
            assert await client.read_to_end() == client.received
            assert b"Host" not in received
            assert len(received) < len(sent)

    run(scenario)


def test_stream_after_a_greeting_of_the_host_is_not_inspected(monkeypatch):
    smtp_commands = (
        b"EHLO me\r\nMAIL FROM:<a@example.org>\r\nDATA\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n.\r\n"
    )

    async def respond(reader, writer):
        writer.write(b"220 mail\r\n")
        writer.write(await reader.readuntil(b"\r\n.\r\n"))

    async def scenario():
        async with gateway_with_egress_host(respond, monkeypatch, rules=RULES) as served:
            client = await tunnel(served, port=PORT)
            await client.read_until(b"\r\n\r\n")
            await client.read_until(b"220 mail\r\n")
            client.writer.write(smtp_commands)
            assert await client.read_exactly(len(smtp_commands)) == smtp_commands
            assert served.events == []

    run(scenario)


@pytest.mark.parametrize("requested", [HOST, "other.example"])
def test_tls_after_a_plaintext_exchange_is_checked(monkeypatch, requested):
    hello, received = client_hello(requested), b""

    async def respond(reader, writer):
        nonlocal received
        assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
        writer.write(b"S")
        while data := await reader.read(1000):
            received += data
            writer.write(b"!")

    async def scenario():
        async with gateway_with_egress_host(respond, monkeypatch, rules=RULES) as served:
            client = await tunnel(served, port=PORT)
            await client.read_until(b"\r\n\r\n")
            client.writer.write(SSL_REQUEST)
            await client.read_until(b"S")
            client.writer.write(hello)
            if requested == HOST:
                await client.read_until(b"!")
                assert (received, served.events) == (hello, [])
            else:
                await wait_until(lambda: served.events_of(EgressDenied) != [])
                assert received == b""

    run(scenario)
