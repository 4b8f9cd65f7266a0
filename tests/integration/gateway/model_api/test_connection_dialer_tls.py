"""The gateway connects to the model's host with TLS and verifies the host's certificate."""

import asyncio
import ssl
from pathlib import Path

import pytest

from doubles.scripted_upstream import UpstreamRequest, scripted_upstream
from doubles.served_gateway import SERVER_KEY, run, served_gateway
from sandbox.model.events import ErrorReported

CERTIFICATE = Path(__file__).parents[3] / "doubles" / "loopback_only.pem"
"""A self-signed certificate for localhost and 127.0.0.1, with its key; only these tests trust it."""


def server_context() -> ssl.SSLContext:
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
def _trusted_certificate(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))


@pytest.mark.usefixtures("_trusted_certificate")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_model_is_reached_over_tls_and_the_connection_is_reused(host):
    async def scenario():
        async with (
            scripted_upstream(hello, server_context()) as upstream,
            served_gateway(f"https://{host}:{upstream.port}") as served,
        ):
            client = await served.connect()
            for _ in range(2):
                client.send_request()
                assert (await client.read_response())[2] == b"hellohellohello"
            assert upstream.connections == 1
            assert upstream.requests[0].headers["x-api-key"] == SERVER_KEY

    run(scenario)


@pytest.mark.usefixtures("_trusted_certificate")
def test_truncated_tls_response_is_truncated_for_the_client():
    async def broken(request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def scenario():
        async with (
            scripted_upstream(broken, server_context()) as upstream,
            served_gateway(f"https://localhost:{upstream.port}") as served,
        ):
            client = await served.connect()
            client.send_request()
            assert (await client.read_to_end()).endswith(b"\r\n\r\n5\r\nhello\r\n")

    run(scenario)


def test_host_with_untrusted_certificate_receives_no_key():
    async def scenario():
        async with (
            scripted_upstream(hello, server_context()) as upstream,
            served_gateway(f"https://localhost:{upstream.port}") as served,
        ):
            client = await served.connect()
            client.send_request()
            status, kind, message = await client.read_error()
            assert (status, kind) == (502, "api_error")
            assert "certificate" in message.lower()
            assert upstream.requests == []
            assert served.events == [ErrorReported("upstream_unreachable", message)]

    run(scenario)
