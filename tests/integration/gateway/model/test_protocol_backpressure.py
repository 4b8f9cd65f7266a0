"""The model does not answer before the agent was judged: its requests wait at the gateway until they are released."""

import asyncio

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway import limits
from sandbox.gateway.model.dialer import UpstreamDialer
from sandbox.interfaces.gateway import GatewayRules

HELD = GatewayRules(hold_model_requests=True)


async def answers(_, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


def waiting(served):
    return sum(conversation.phase.value == "held" for conversation in served.gateway._model_protocols)


def test_requests_wait_and_go_on_unchanged_when_they_are_released():
    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            clients = [await served.connect() for _ in range(3)]
            for number, client in enumerate(clients):
                client.ask(b'{"n":%d}' % number)
            await until_true(lambda: waiting(served) == 3)
            assert (upstream.connections, served.gateway.requests_in_flight) == (0, 0)
            served.gateway.release_model_requests()
            for client in clients:
                assert (await client.answer())[0] == 200
            assert {request.body for request in upstream.requests} == {b'{"n":0}', b'{"n":1}', b'{"n":2}'}
            served.gateway.release_model_requests()
            clients[0].ask(b"{}")
            assert (await clients[0].answer())[0] == 200

    run(story)


def test_a_body_that_ends_after_the_release_goes_on_too():
    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.ask(b"{}")
            await until_true(lambda: waiting(served) == 1)
            late = await served.connect()
            head = (
                f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: task-key-of-this-task\r\n"
            )
            late.writer.write(head.encode() + b'Content-Length: 7\r\n\r\n{"a"')
            await until_true(lambda: served.gateway._budget_gate._buffered_bytes == 6)
            served.gateway.release_model_requests()
            late.writer.write(b":1}")
            assert (await late.answer())[0] == 200
            assert {request.body for request in upstream.requests} == {b"{}", b'{"a":1}'}

    run(story)


def test_a_request_without_the_tasks_key_is_refused_at_once():
    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.ask(key="wrong")
            assert (await client.error())[0] == 401
            assert not upstream.requests

    run(story)


def test_who_waits_too_long_is_told_so_and_may_ask_again(monkeypatch):
    monkeypatch.setattr(limits, "HOLD_SECONDS", 0.2)

    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.ask()
            assert (await client.error())[:2] == (503, "api_error")
            assert not upstream.connections
            served.gateway.release_model_requests()
            client.ask()
            assert (await client.answer())[0] == 200

    run(story)


def test_who_leaves_while_waiting_is_forgotten():
    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.ask()
            await until_true(lambda: waiting(served) == 1)
            client.leave()
            await until_true(lambda: not served.gateway._model_protocols)
            served.gateway.release_model_requests()
            await asyncio.sleep(0.05)
            assert not upstream.connections

    run(story)


@pytest.mark.parametrize("stays", [False, True])
def test_who_leaves_while_the_model_is_dialled_spends_nothing(monkeypatch, stays):
    dialling, may_go_on, dial = asyncio.Event(), asyncio.Event(), UpstreamDialer.dial

    async def dial_slowly(dialler):
        dialling.set()
        await may_go_on.wait()
        return await dial(dialler)

    monkeypatch.setattr(UpstreamDialer, "dial", dial_slowly)

    async def story():
        async with scripted_upstream(answers) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.ask()
            await until_true(lambda: waiting(served) == 1)
            served.gateway.release_model_requests()
            await until_true(dialling.is_set)
            if not stays:
                client.leave()
                await until_true(lambda: served.gateway.requests_in_flight == 0)
            may_go_on.set()
            if stays:
                assert (await client.answer())[0] == 200
            else:
                await until_true(lambda: not served.gateway._model_protocols)
            assert len(upstream.requests) == stays

    run(story)
