"""A task has a budget: what it has cost is counted as it passes, and nothing is forwarded once that is the budget."""

import asyncio
import json

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway.model import budget as model_budget
from sandbox.interfaces.gateway import Budget, BudgetExhausted, GatewayRules
from sandbox.model.events import Usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED = b'{"model":"claude-haiku-4-5","stream":true}'


def events(model="claude-haiku-4-5", tokens_in=1000, tokens_out=1000):
    """An answer; at the prices of Haiku 4.5 (1 and 5 USD per million) it costs 0.006 USD."""
    start = {"type": "message_start", "message": {"model": model, "usage": {"input_tokens": tokens_in}}}
    delta = {"type": "message_delta", "usage": {"output_tokens": tokens_out}}
    return [f"data: {json.dumps(event)}\n\n".encode() for event in (start, delta, {"type": "message_stop"})]


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def answers(**told):
    async def script(_, writer):
        writer.write(HEAD + b"".join(chunk(event) for event in events(**told)) + b"0\r\n\r\n")

    return script


def usd(budget):
    return GatewayRules(budget=Budget(usd=budget))


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        (Budget(usd=0.015), "lifecycle.budget_usd is spent (0.018 of 0.015 USD)"),
        (Budget(tokens=5500), "lifecycle.budget_tokens is spent (6000 of 5500 tokens)"),
        (Budget(usd=1.0, tokens=6000), "lifecycle.budget_tokens is spent (6000 of 6000 tokens)"),
    ],
)
def test_requests_go_on_until_the_budget_is_reached_and_not_one_after(budget, named):
    async def story():
        rules = GatewayRules(budget=budget)
        async with scripted_upstream(answers()) as upstream, served_gateway(upstream.base_url, rules) as served:
            client = await served.connect()
            for _ in range(3):
                assert not served.of(BudgetExhausted)
                client.ask(ASKED)
                assert (await client.answer())[0] == 200
            assert len(served.of(BudgetExhausted)) == 1, "told when the answer ends, not only at the next request"
            assert served.of(BudgetExhausted)[0].message.startswith(named)
            for _ in range(2):
                client.ask(ASKED)
                status, kind, message = await client.error()
                assert (status, kind) == (403, "permission_error")
                assert message.startswith(named)
            assert len(upstream.requests) == 3
            assert len(served.of(BudgetExhausted)) == 1
            assert len(served.of(Usage)) == 3

    run(story)


def test_an_answer_under_way_may_reach_it_and_is_still_delivered_to_its_end():
    async def story():
        async def half_then_rest(request, writer):
            start, delta, stop = events()
            writer.write(HEAD + chunk(start) + chunk(delta))
            await writer.drain()
            await request.reader.readexactly(0)
            await until_true(lambda: bool(served.of(BudgetExhausted)))
            other = await served.connect()
            other.ask(ASKED)
            assert (await other.error())[0] == 403
            writer.write(chunk(stop) + b"0\r\n\r\n")

        async with (
            scripted_upstream(half_then_rest) as upstream,
            served_gateway(upstream.base_url, usd(0.006)) as served,
        ):
            client = await served.connect()
            client.ask(ASKED)
            status, _, body = await client.answer()
            assert (status, body) == (200, b"".join(events()))
            assert len(served.of(Usage)) == 1
            assert len(upstream.requests) == 1

    run(story)


@pytest.mark.parametrize("leaves", ["before the answer", "within the answer", "by a flood"])
def test_who_leaves_early_pays_for_the_whole_answer(leaves):
    async def story():
        gone = asyncio.Event()

        async def slow(_, writer):
            start, delta, stop = events()
            if leaves != "before the answer":
                writer.write(HEAD + chunk(start))
            await gone.wait()
            head = HEAD + chunk(start) if leaves == "before the answer" else b""
            writer.write(head + chunk(delta) + chunk(stop) + b"0\r\n\r\n")

        async with scripted_upstream(slow) as upstream, served_gateway(upstream.base_url, usd(0.006)) as served:
            client = await served.connect()
            client.ask(ASKED)
            await until_true(lambda: bool(upstream.requests))
            if leaves == "by a flood":
                client.writer.write(bytes(200_000))
                await client.rest()
            elif leaves == "within the answer":
                await client.until(b"message_start")
            client.leave()
            await asyncio.sleep(0.05)
            assert not upstream.hung_up.is_set()
            gone.set()
            await until_true(lambda: bool(served.of(BudgetExhausted)))
            assert served.of(Usage)[0].cost_usd == 0.006
            await until_true(lambda: not served.gateway._model_protocols and upstream.hung_up.is_set())

    run(story)


def test_without_a_budget_the_model_is_told_that_nobody_waits_any_more():
    async def story():
        async def never(_, writer):
            writer.write(HEAD + chunk(events()[0]))
            await asyncio.sleep(0)

        async with scripted_upstream(never) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.ask(ASKED)
            await client.until(b"message_start")
            client.leave()
            await until_true(upstream.hung_up.is_set)

    run(story)


def test_a_model_without_a_price_is_refused_where_dollars_are_bounded_and_passes_where_they_are_not():
    async def story():
        asked = b'{"model":"nobody-knows-it","messages":[]}'
        async with scripted_upstream(answers(model="nobody-knows-it")) as upstream:
            async with served_gateway(upstream.base_url, usd(1.0)) as served:
                client = await served.connect()
                client.ask(asked)
                status, kind, message = await client.error()
                assert (status, kind) == (403, "permission_error")
                assert "nobody-knows-it has no price" in message
                client.ask(b"no JSON at all")
                assert (await client.error())[0] == 400
                assert not upstream.requests
                assert not served.of(BudgetExhausted)
            async with served_gateway(upstream.base_url, GatewayRules(budget=Budget(tokens=10_000))) as served:
                client = await served.connect()
                client.ask(asked)
                assert (await client.answer())[0] == 200

    run(story)


def test_an_upstream_that_answers_with_a_model_without_a_price_ends_the_budget():
    async def story():
        script = answers(model="another")
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url, usd(1.0)) as served:
            client = await served.connect()
            client.ask(ASKED)
            assert (await client.answer())[0] == 200
            assert "The model another answered" in served.of(BudgetExhausted)[0].message
            client.ask(ASKED)
            assert (await client.error())[0] == 403

    run(story)


def test_counting_tokens_costs_nothing_and_names_no_price():
    async def count(_, writer):
        writer.write(
            b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{"input_tokens":9}'
        )

    async def story():
        async with scripted_upstream(count) as upstream, served_gateway(upstream.base_url, usd(1.0)) as served:
            client = await served.connect()
            client.ask(b'{"model":"nobody-knows-it"}', target="/v1/messages/count_tokens")
            assert (await client.answer())[0] == 200
            assert served.told == []

    run(story)


def test_a_body_that_waits_for_its_judgement_arrives_byte_for_byte():
    async def story():
        body = b'{"model":"claude-haiku-4-5","padding":"' + b"x" * 3_000_000 + b'"}'
        async with scripted_upstream(answers()) as upstream, served_gateway(upstream.base_url, usd(1.0)) as served:
            client = await served.connect()
            client.ask(body)
            assert (await client.answer())[0] == 200
            assert upstream.requests[0].body == body

    run(story)


def test_bodies_that_wait_have_a_bound_together_and_room_comes_back(monkeypatch):
    monkeypatch.setattr(model_budget, "BUFFERED_BYTES_MAX", 100_000)

    async def story():
        async with scripted_upstream(answers()) as upstream, served_gateway(upstream.base_url, usd(1.0)) as served:
            slow = await served.connect()
            head = (
                f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: task-key-of-this-task\r\n"
            )
            slow.writer.write(head.encode() + b"Content-Length: 90000\r\n\r\n" + b"x" * 80_000)
            other = await served.connect()
            await until_true(lambda: served.gateway._budget_gate._buffered_bytes == 80_000)
            other.ask(b" " * 30_000)
            assert (await other.error())[:2] == (429, "rate_limit_error")
            slow.leave()
            await until_true(lambda: served.gateway._budget_gate._buffered_bytes == 0)
            again = await served.connect()
            again.ask(ASKED + b" " * 30_000)
            assert (await again.answer())[0] == 200

    run(story)
