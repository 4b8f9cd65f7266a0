"""The gateway meters a response to its end even if the client does not read it."""

import asyncio
import json
import socket
from contextlib import closing

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import GATEWAY_KEY, ServedGateway, run, served_gateway, wait_until
from sandbox.gateway import limits
from sandbox.interfaces.gateway import Budget, GatewayRules
from sandbox.model.events import Usage

MEBIBYTE = 1024 * 1024
BUDGET = GatewayRules(budget=Budget(usd=1.0))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
START = {
    "type": "message_start",
    "message": {"model": "claude-haiku-4-5", "usage": {"input_tokens": 1000, "output_tokens": 1}},
}
TEXT = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 4000}}
DELTA = {"type": "message_delta", "usage": {"output_tokens": 1000}}


def sse(event):
    data = f"data: {json.dumps(event)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


async def stream(_, writer):
    writer.write(HEAD + sse(START))
    for _ in range(8 * MEBIBYTE // 4000):
        writer.write(sse(TEXT))
        await writer.drain()
    writer.write(sse(DELTA) + b"0\r\n\r\n")


async def respond_with_json(_, writer):
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    body = json.dumps({"model": "claude-haiku-4-5", "content": "x" * 3 * MEBIBYTE, "usage": usage}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def client_with_request(served: ServedGateway) -> socket.socket:
    """Return the socket of a client that has sent a request and has a small receive buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", served.port))
    body = b'{"model":"claude-haiku-4-5","max_tokens":64000,"stream":true}'
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: {GATEWAY_KEY}\r\n"
    await loop.sock_sendall(client, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return client


@pytest.mark.parametrize("script", [stream, respond_with_json])
def test_unread_response_is_metered_to_its_end(monkeypatch, script):
    monkeypatch.setattr(limits, "CLIENT_STALL_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            with closing(await client_with_request(served)):
                await wait_until(lambda: bool(served.events_of(Usage)))
                assert served.events_of(Usage) == [Usage("claude-haiku-4-5", 1000, 1000, cost_usd=0.006)]
                await wait_until(lambda: not served.gateway._model_protocols)

    run(scenario)


def test_slow_reads_do_not_delay_metering(monkeypatch):
    monkeypatch.setattr(limits, "CLIENT_STALL_TIMEOUT_SECONDS", 0.3)

    async def scenario():
        loop = asyncio.get_running_loop()
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            with closing(await client_with_request(served)) as client:
                taken = 0
                while not served.events_of(Usage) and taken < 4 * MEBIBYTE:
                    await asyncio.sleep(0.1)
                    try:
                        part = await asyncio.wait_for(loop.sock_recv(client, 128 * 1024), 5)
                    except ConnectionError:
                        break
                    taken += len(part)
                    if not part:
                        break
                await wait_until(lambda: bool(served.events_of(Usage)))
                assert served.events_of(Usage)[0].output_tokens == 1000
                assert taken < 4 * MEBIBYTE

    run(scenario)


@pytest.mark.parametrize("rules", [BUDGET, GatewayRules()])
def test_client_that_pauses_within_its_timeout_receives_the_full_response(monkeypatch, rules):
    monkeypatch.setattr(limits, "UPSTREAM_TIMEOUT_SECONDS", 1.0)

    async def scenario():
        loop = asyncio.get_running_loop()
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url, rules) as served:
            with closing(await client_with_request(served)) as client:
                await asyncio.sleep(1.5)
                received = b""
                while not received.endswith(b"\r\n0\r\n\r\n"):
                    part = await loop.sock_recv(client, MEBIBYTE)
                    assert part, "the response was cut off"
                    received += part
                assert served.events_of(Usage)[0].output_tokens == 1000

    run(scenario)


def test_slow_client_without_a_budget_has_no_stall_timeout(monkeypatch):
    monkeypatch.setattr(limits, "CLIENT_STALL_TIMEOUT_SECONDS", 0.05)

    async def scenario():
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url) as served:
            with closing(await client_with_request(served)):
                await asyncio.sleep(0.5)
                assert served.gateway.requests_in_flight == 1
                assert not served.events_of(Usage)

    run(scenario)


def test_timed_out_request_is_charged_with_its_upper_bound(monkeypatch):
    monkeypatch.setattr(limits, "UPSTREAM_TIMEOUT_SECONDS", 0.2)

    async def never_respond(request, _):
        await request.reader.read()

    async def scenario():
        async with scripted_upstream(never_respond) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            client = await served.connect()
            client.send_request(b'{"model":"claude-haiku-4-5","max_tokens":5000}')
            assert (await client.read_error())[0] == 504
            assert served.events_of(Usage)[0].output_tokens == 5000

    run(scenario)
