"""The budget of a task: usage is metered in the stream, and an exhausted budget stops model requests."""

import asyncio
import json

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway import limits, tcp_connections
from sandbox.gateway.model_api import request_gate
from sandbox.gateway.sans_io import Phase
from sandbox.interfaces.gateway import Budget, BudgetExhausted, GatewayRules
from sandbox.model.events import Usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = b'{"model":"claude-haiku-4-5","stream":true}'


def events(model="claude-haiku-4-5", tokens_in=1000, tokens_out=1000):
    """Return the events of a response that costs 0.006 USD with Haiku 4.5 (1 and 5 USD per million tokens)."""
    start = {"type": "message_start", "message": {"model": model, "usage": {"input_tokens": tokens_in}}}
    delta = {"type": "message_delta", "usage": {"output_tokens": tokens_out}}
    return [f"data: {json.dumps(event)}\n\n".encode() for event in (start, delta, {"type": "message_stop"})]


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def respond_with(**usage):
    async def script(_, writer):
        writer.write(HEAD + b"".join(chunk(event) for event in events(**usage)) + b"0\r\n\r\n")

    return script


def rules_with_budget(usd):
    return GatewayRules(budget=Budget(usd=usd))


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(usd=0.015), "lifecycle.budget_usd (0.015 USD) is spent"),
        (Budget(tokens=5500), "lifecycle.budget_tokens (5,500 tokens) is spent"),
        (Budget(usd=1.0, tokens=6000), "lifecycle.budget_tokens (6,000 tokens) is spent"),
    ],
)
def test_requests_are_forwarded_until_the_budget_is_reached(budget, reason):
    async def scenario():
        rules = GatewayRules(budget=budget)
        async with scripted_upstream(respond_with()) as upstream, served_gateway(upstream.base_url, rules) as served:
            client = await served.connect()
            for _ in range(3):
                assert not served.events_of(BudgetExhausted)
                client.send_request(REQUEST)
                assert (await client.read_response())[0] == 200
            assert len(served.events_of(BudgetExhausted)) == 1, (
                "reported when the response ends, not at the next request"
            )
            assert served.events_of(BudgetExhausted)[0].message.startswith(reason)
            for _ in range(2):
                client.send_request(REQUEST)
                status, kind, message = await client.read_error()
                assert (status, kind) == (402, "billing_error")
                assert message.startswith(reason)
            assert len(upstream.requests) == 3
            assert len(served.events_of(BudgetExhausted)) == 1
            assert len(served.events_of(Usage)) == 3

    run(scenario)


@pytest.mark.parametrize(("budget", "status", "sent"), [(0.006, 402, 1), (0.013, 200, 2)])
def test_request_that_waits_for_a_connection_is_refused_once_the_budget_is_reached(monkeypatch, budget, status, sent):
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_BURST", 1)
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_PER_SECOND", 1.0)

    async def scenario():
        async def respond_while_another_request_waits(request, writer):
            await wait_until(lambda: served.gateway.requests_in_flight == 2 or len(upstream.requests) == 2)
            await respond_with()(request, writer)

        async with (
            scripted_upstream(respond_while_another_request_waits) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(budget)) as served,
        ):
            first, waiting = await served.connect(), await served.connect()
            first.send_request(REQUEST)
            await wait_until(lambda: bool(upstream.requests))
            waiting.send_request(REQUEST)
            assert (await first.read_response())[0] == 200
            assert (await waiting.read_response())[0] == status
            assert len(upstream.requests) == sent
            assert len(served.events_of(Usage)) == sent
            assert served.gateway.denied_count == 2 - sent

    run(scenario)


@pytest.mark.parametrize("rules", [GatewayRules(), rules_with_budget(100)])
def test_wait_for_a_connection_may_exceed_the_head_timeout(monkeypatch, rules):
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_BURST", 1)
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_PER_SECOND", 1.0)
    monkeypatch.setitem(tcp_connections.PHASE_TIMEOUT_SECONDS, Phase.HEAD, 0.4)

    async def scenario():
        async with scripted_upstream(respond_with()) as upstream, served_gateway(upstream.base_url, rules) as served:
            clients = [await served.connect() for _ in range(2)]
            for client in clients:
                client.send_request(REQUEST)
            assert [(await client.read_response())[0] for client in clients] == [200, 200]

    run(scenario)


def test_connection_without_a_complete_head_times_out(monkeypatch):
    monkeypatch.setitem(tcp_connections.PHASE_TIMEOUT_SECONDS, Phase.HEAD, 0.4)

    async def scenario():
        async with scripted_upstream(respond_with()) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.writer.write(b"POST /v1/messages HTTP/1.1\r\n")
            assert await client.read_to_end() == b""
            assert not upstream.requests

    run(scenario)


def test_request_that_waits_for_a_connection_at_shutdown_costs_nothing(monkeypatch):
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_BURST", 1)
    monkeypatch.setattr(limits, "MODEL_CONNECTIONS_PER_SECOND", 0.01)

    async def scenario():
        async with (
            scripted_upstream(respond_with()) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(100)) as served,
        ):
            first, waiting = await served.connect(), await served.connect()
            first.send_request(REQUEST)
            assert (await first.read_response())[0] == 200
            waiting.send_request(b'{"model":"claude-haiku-4-5","max_tokens":64000}')
            await wait_until(lambda: served.gateway.requests_in_flight == 1)
            await served.stop()
            assert len(upstream.requests) == 1
            assert len(served.events_of(Usage)) == 1

    run(scenario)


def test_response_that_exhausts_the_budget_is_delivered_to_its_end():
    async def scenario():
        async def respond_in_two_parts(request, writer):
            start, delta, stop = events()
            writer.write(HEAD + chunk(start) + chunk(delta))
            await writer.drain()
            await request.reader.readexactly(0)
            await wait_until(lambda: bool(served.events_of(BudgetExhausted)))
            other = await served.connect()
            other.send_request(REQUEST)
            assert (await other.read_error())[0] == 402
            writer.write(chunk(stop) + b"0\r\n\r\n")

        async with (
            scripted_upstream(respond_in_two_parts) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(0.006)) as served,
        ):
            client = await served.connect()
            client.send_request(REQUEST)
            status, _, body = await client.read_response()
            assert (status, body) == (200, b"".join(events()))
            assert len(served.events_of(Usage)) == 1
            assert len(upstream.requests) == 1

    run(scenario)


IMAGE = '{"type":"image","source":{"type":"base64","media_type":"image/png","data":"iVBORw0KGgo="}}'


@pytest.mark.parametrize(
    ("budget_usd", "max_tokens", "content"),
    [
        pytest.param(0.006, 1000, '{"type":"text","text":"x"}', id="output"),
        pytest.param(0.09, 1, ",".join([IMAGE] * 100), id="images"),
    ],
)
def test_at_most_16_requests_in_flight_can_exceed_the_budget(budget_usd, max_tokens, content):
    async def scenario():
        release = asyncio.Event()

        async def respond_when_released(_, writer):
            await release.wait()
            await respond_with()(_, writer)

        fields = f'"model":"claude-haiku-4-5","stream":true,"max_tokens":{max_tokens}'
        body = f'{{{fields},"messages":[{{"role":"user","content":[{content}]}}]}}'.encode()
        async with (
            scripted_upstream(respond_when_released) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(budget_usd)) as served,
        ):
            clients = [await served.connect() for _ in range(40)]
            for client in clients[:16]:
                client.send_request(body)
            await wait_until(lambda: len(upstream.requests) == 16)
            for client in clients[16:]:
                client.send_request(body)
            for client in clients[16:]:
                status, kind, message = await client.read_error()
                assert (status, kind) == (429, "rate_limit_error")
                assert message.startswith("The model requests in flight may spend the rest of the budget")
            assert not served.events_of(BudgetExhausted)
            release.set()
            for client in clients[:16]:
                assert (await client.read_response())[0] == 200
            assert len(served.events_of(Usage)) == len(upstream.requests) == 16
            assert len(served.events_of(BudgetExhausted)) == 1

    run(scenario)


@pytest.mark.parametrize("disconnects", ["before the response", "within the response", "by a flood"])
def test_disconnected_client_is_charged_for_the_full_response(disconnects):
    async def scenario():
        has_left = asyncio.Event()

        async def slow(_, writer):
            start, delta, stop = events()
            if disconnects != "before the response":
                writer.write(HEAD + chunk(start))
            await has_left.wait()
            head = HEAD + chunk(start) if disconnects == "before the response" else b""
            writer.write(head + chunk(delta) + chunk(stop) + b"0\r\n\r\n")

        async with (
            scripted_upstream(slow) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(0.006)) as served,
        ):
            client = await served.connect()
            client.send_request(REQUEST)
            await wait_until(lambda: bool(upstream.requests))
            if disconnects == "by a flood":
                client.writer.write(bytes(200_000))
                await client.read_to_end()
            elif disconnects == "within the response":
                await client.read_until(b"message_start")
            client.abort()
            await asyncio.sleep(0.05)
            assert not upstream.disconnected.is_set()
            has_left.set()
            await wait_until(lambda: bool(served.events_of(BudgetExhausted)))
            assert served.events_of(Usage)[0].cost_usd == 0.006
            await wait_until(lambda: not served.gateway._model_protocols and upstream.disconnected.is_set())

    run(scenario)


def test_disconnect_without_a_budget_closes_the_upstream():
    async def scenario():
        async def respond_partially(_, writer):
            writer.write(HEAD + chunk(events()[0]))
            await asyncio.sleep(0)

        async with scripted_upstream(respond_partially) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request(REQUEST)
            await client.read_until(b"message_start")
            client.abort()
            await wait_until(upstream.disconnected.is_set)

    run(scenario)


def test_model_without_a_price_is_refused_only_with_a_usd_budget():
    async def scenario():
        request = b'{"model":"unknown-model","messages":[]}'
        async with scripted_upstream(respond_with(model="unknown-model")) as upstream:
            async with served_gateway(upstream.base_url, rules_with_budget(1.0)) as served:
                client = await served.connect()
                client.send_request(request)
                status, kind, message = await client.read_error()
                assert (status, kind) == (402, "billing_error")
                assert "unknown-model has no price" in message
                client.send_request(b"no JSON at all")
                assert (await client.read_error())[0] == 400
                assert not upstream.requests
                assert not served.events_of(BudgetExhausted)
            async with served_gateway(upstream.base_url, GatewayRules(budget=Budget(tokens=10_000))) as served:
                client = await served.connect()
                client.send_request(request)
                assert (await client.read_response())[0] == 200

    run(scenario)


def test_response_of_a_model_without_a_price_exhausts_the_budget():
    async def scenario():
        script = respond_with(model="another")
        async with (
            scripted_upstream(script) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(1.0)) as served,
        ):
            client = await served.connect()
            client.send_request(REQUEST)
            assert (await client.read_response())[0] == 200
            assert "A response came from the model another" in served.events_of(BudgetExhausted)[0].message
            client.send_request(REQUEST)
            assert (await client.read_error())[0] == 402

    run(scenario)


def test_token_counting_request_is_free_and_needs_no_price():
    async def count(_, writer):
        writer.write(
            b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{"input_tokens":9}'
        )

    async def scenario():
        async with (
            scripted_upstream(count) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(1.0)) as served,
        ):
            client = await served.connect()
            client.send_request(b'{"model":"unknown-model"}', target="/v1/messages/count_tokens")
            assert (await client.read_response())[0] == 200
            assert served.events == []

    run(scenario)


def test_buffered_body_is_forwarded_unchanged():
    async def scenario():
        body = b'{"model":"claude-haiku-4-5","padding":"' + b"x" * 3_000_000 + b'"}'
        async with (
            scripted_upstream(respond_with()) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(1.0)) as served,
        ):
            client = await served.connect()
            client.send_request(body)
            assert (await client.read_response())[0] == 200
            assert upstream.requests[0].body == body

    run(scenario)


def test_buffered_bodies_share_a_limit_and_are_released(monkeypatch):
    monkeypatch.setattr(request_gate, "BUFFERED_BYTES_MAX", 100_000)

    async def scenario():
        async with (
            scripted_upstream(respond_with()) as upstream,
            served_gateway(upstream.base_url, rules_with_budget(1.0)) as served,
        ):
            slow = await served.connect()
            head = (
                f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: task-key-of-this-task\r\n"
            )
            slow.writer.write(head.encode() + b"Content-Length: 90000\r\n\r\n" + b"x" * 80_000)
            other = await served.connect()
            await wait_until(lambda: served.gateway._request_gate._buffered_bytes == 80_000)
            other.send_request(b" " * 30_000)
            assert (await other.read_error())[:2] == (429, "rate_limit_error")
            slow.abort()
            await wait_until(lambda: served.gateway._request_gate._buffered_bytes == 0)
            later_client = await served.connect()
            later_client.send_request(REQUEST + b" " * 30_000)
            assert (await later_client.read_response())[0] == 200

    run(scenario)
