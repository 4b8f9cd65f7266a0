"""A client that takes nothing of its answer does not keep the gateway from hearing what the answer has cost."""

import asyncio
import json
import socket
from contextlib import closing

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import TASK_KEY, ServedGateway, run, served_gateway, until_true
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


async def document(_, writer):
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    body = json.dumps({"model": "claude-haiku-4-5", "content": "x" * 3 * MEBIBYTE, "usage": usage}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def asked(served: ServedGateway) -> socket.socket:
    """The socket of a client that has asked and has room for little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", served.port))
    body = b'{"model":"claude-haiku-4-5","max_tokens":64000,"stream":true}'
    head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: {TASK_KEY}\r\n"
    await loop.sock_sendall(client, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return client


@pytest.mark.parametrize("script", [stream, document])
def test_its_answer_is_heard_to_the_end_without_it(monkeypatch, script):
    monkeypatch.setattr(limits, "CLIENT_STALL_SECONDS", 0.2)

    async def story():
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            with closing(await asked(served)):
                await until_true(lambda: bool(served.of(Usage)))
                assert served.of(Usage) == [Usage("claude-haiku-4-5", 1000, 1000, cost_usd=0.006)]
                await until_true(lambda: not served.gateway._model_protocols)

    run(story)


def test_taking_a_little_now_and_then_does_not_help_it(monkeypatch):
    monkeypatch.setattr(limits, "CLIENT_STALL_SECONDS", 0.3)

    async def story():
        loop = asyncio.get_running_loop()
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            with closing(await asked(served)) as client:
                taken = 0
                while not served.of(Usage) and taken < 4 * MEBIBYTE:
                    await asyncio.sleep(0.1)
                    try:
                        part = await asyncio.wait_for(loop.sock_recv(client, 128 * 1024), 5)
                    except ConnectionError:
                        break
                    taken += len(part)
                    if not part:
                        break
                await until_true(lambda: bool(served.of(Usage)))
                assert served.of(Usage)[0].output_tokens == 1000
                assert taken < 4 * MEBIBYTE

    run(story)


@pytest.mark.parametrize("rules", [BUDGET, GatewayRules()])
def test_who_is_slow_but_takes_it_within_its_time_gets_all_of_it(monkeypatch, rules):
    monkeypatch.setattr(limits, "UPSTREAM_SECONDS", 1.0)

    async def story():
        loop = asyncio.get_running_loop()
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url, rules) as served:
            with closing(await asked(served)) as client:
                await asyncio.sleep(1.5)
                received = b""
                while not received.endswith(b"\r\n0\r\n\r\n"):
                    part = await loop.sock_recv(client, MEBIBYTE)
                    assert part, "it was cut off"
                    received += part
                assert served.of(Usage)[0].output_tokens == 1000

    run(story)


def test_without_a_budget_it_may_take_its_time(monkeypatch):
    monkeypatch.setattr(limits, "CLIENT_STALL_SECONDS", 0.05)

    async def story():
        async with scripted_upstream(stream) as upstream, served_gateway(upstream.base_url) as served:
            with closing(await asked(served)):
                await asyncio.sleep(0.5)
                assert served.gateway.requests_in_flight == 1
                assert not served.of(Usage)

    run(story)


def test_an_answer_that_the_model_is_too_slow_with_is_not_free(monkeypatch):
    monkeypatch.setattr(limits, "UPSTREAM_SECONDS", 0.2)

    async def never(request, _):
        await request.reader.read()

    async def story():
        async with scripted_upstream(never) as upstream, served_gateway(upstream.base_url, BUDGET) as served:
            client = await served.connect()
            client.ask(b'{"model":"claude-haiku-4-5","max_tokens":5000}')
            assert (await client.error())[0] == 504
            assert served.of(Usage)[0].output_tokens == 5000

    run(story)
