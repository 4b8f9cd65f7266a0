"""The gateway holds model requests until the agent's start has been checked."""

import asyncio

import pytest

from doubles.scripted_upstream import scripted_upstream
from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway import limits
from sandbox.gateway.model_api.connection import UpstreamDialer
from sandbox.interfaces.gateway import GatewayRules

HELD = GatewayRules(hold_model_requests=True)


async def respond(_, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


def count_held_requests(served):
    return sum(protocol.phase.value == "held" for protocol in served.gateway._model_protocols)


def test_held_requests_are_forwarded_unchanged_on_release():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            clients = [await served.connect() for _ in range(3)]
            for number, client in enumerate(clients):
                client.send_request(b'{"n":%d}' % number)
            await wait_until(lambda: count_held_requests(served) == 3)
            assert (upstream.connections, served.gateway.requests_in_flight) == (0, 0)
            served.gateway.release_model_requests()
            for client in clients:
                assert (await client.read_response())[0] == 200
            assert {request.body for request in upstream.requests} == {b'{"n":0}', b'{"n":1}', b'{"n":2}'}
            served.gateway.release_model_requests()
            clients[0].send_request(b"{}")
            assert (await clients[0].read_response())[0] == 200

    run(scenario)


def test_body_that_ends_after_the_release_is_forwarded():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.send_request(b"{}")
            await wait_until(lambda: count_held_requests(served) == 1)
            late_client = await served.connect()
            head = (
                f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Api-Key: task-key-of-this-task\r\n"
            )
            late_client.writer.write(head.encode() + b'Content-Length: 7\r\n\r\n{"a"')
            await wait_until(lambda: served.gateway._request_gate._buffered_bytes == 6)
            served.gateway.release_model_requests()
            late_client.writer.write(b":1}")
            assert (await late_client.read_response())[0] == 200
            assert {request.body for request in upstream.requests} == {b"{}", b'{"a":1}'}

    run(scenario)


def test_request_with_a_wrong_key_is_refused_immediately():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.send_request(key="wrong")
            assert (await client.read_error())[0] == 401
            assert not upstream.requests

    run(scenario)


def test_held_request_times_out_and_can_be_retried(monkeypatch):
    monkeypatch.setattr(limits, "HOLD_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.send_request()
            assert (await client.read_error())[:2] == (503, "api_error")
            assert not upstream.connections
            served.gateway.release_model_requests()
            client.send_request()
            assert (await client.read_response())[0] == 200

    run(scenario)


def test_held_request_of_a_disconnected_client_is_dropped():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.send_request()
            await wait_until(lambda: count_held_requests(served) == 1)
            client.abort()
            await wait_until(lambda: not served.gateway._model_protocols)
            served.gateway.release_model_requests()
            await asyncio.sleep(0.05)
            assert not upstream.connections

    run(scenario)


@pytest.mark.parametrize("stays_connected", [False, True])
def test_disconnect_during_upstream_dial_sends_no_request(monkeypatch, stays_connected):
    dialing, may_continue, dial = asyncio.Event(), asyncio.Event(), UpstreamDialer.dial

    async def dial_slowly(dialer):
        dialing.set()
        await may_continue.wait()
        return await dial(dialer)

    monkeypatch.setattr(UpstreamDialer, "dial", dial_slowly)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url, HELD) as served:
            client = await served.connect()
            client.send_request()
            await wait_until(lambda: count_held_requests(served) == 1)
            served.gateway.release_model_requests()
            await wait_until(dialing.is_set)
            if not stays_connected:
                client.abort()
                await wait_until(lambda: served.gateway.requests_in_flight == 0)
            may_continue.set()
            if stays_connected:
                assert (await client.read_response())[0] == 200
            else:
                await wait_until(lambda: not served.gateway._model_protocols)
            assert len(upstream.requests) == stays_connected

    run(scenario)
