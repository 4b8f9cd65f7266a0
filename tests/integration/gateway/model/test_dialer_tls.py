"""The gateway speaks TLS to the model's host, and only to the one whose certificate says so."""

import asyncio
import ssl
from pathlib import Path

import pytest

from doubles.scripted_upstream import UpstreamRequest, scripted_upstream
from doubles.served_gateway import SERVER_KEY, run, served_gateway
from sandbox.model.events import ErrorReported

CERTIFICATE = Path(__file__).parents[3] / "doubles" / "loopback_only.pem"
"""A certificate of its own authority for localhost and 127.0.0.1, with its key; trusted by nobody but these tests."""


def server_side() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


async def hello(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()
    for _ in range(3):
        writer.write(b"5\r\nhello\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")


@pytest.fixture
def _trusted(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))


@pytest.mark.usefixtures("_trusted")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_model_is_reached_over_tls_and_its_connection_kept(host):
    async def story():
        async with (
            scripted_upstream(hello, server_side()) as upstream,
            served_gateway(f"https://{host}:{upstream.port}") as served,
        ):
            client = await served.connect()
            for _ in range(2):
                client.ask()
                assert (await client.answer())[2] == b"hellohellohello"
            assert upstream.connections == 1
            assert upstream.requests[0].headers["x-api-key"] == SERVER_KEY

    run(story)


@pytest.mark.usefixtures("_trusted")
def test_an_answer_that_breaks_off_under_tls_is_seen_as_broken():
    async def broken(request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def story():
        async with (
            scripted_upstream(broken, server_side()) as upstream,
            served_gateway(f"https://localhost:{upstream.port}") as served,
        ):
            client = await served.connect()
            client.ask()
            assert (await client.rest()).endswith(b"\r\n\r\n5\r\nhello\r\n")

    run(story)


def test_a_host_that_nobody_vouches_for_never_sees_the_key():
    async def story():
        async with (
            scripted_upstream(hello, server_side()) as upstream,
            served_gateway(f"https://localhost:{upstream.port}") as served,
        ):
            client = await served.connect()
            client.ask()
            status, kind, message = await client.error()
            assert (status, kind) == (502, "api_error")
            assert "certificate" in message.lower()
            assert upstream.requests == []
            assert served.told == [ErrorReported("upstream_unreachable", message)]

    run(story)
