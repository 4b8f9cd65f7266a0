"""The demo's HTTP service sends each part of a response immediately, and stops even if clients are connected."""

import asyncio
import time

import httpx2
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse

from sandbox.demo.loopback_http_service import HttpService, request_target


async def endless(_):
    async def parts():
        while True:
            yield b"part"
            await asyncio.sleep(0.01)

    return StreamingResponse(parts())


async def hanging(_):
    await asyncio.Event().wait()


@pytest.mark.parametrize("handler", [endless, hanging])
async def test_stop_closes_connections_in_use_without_an_error_message(handler, caplog):
    async with httpx2.AsyncClient(trust_env=False) as client:
        async with HttpService("127.0.0.1", 0, handler) as service:
            request = asyncio.create_task(client.get(service.url))
            await asyncio.sleep(0.2)
            end = time.monotonic()
        with pytest.raises(httpx2.TransportError):
            await request
    assert time.monotonic() - end < 1
    assert caplog.messages == []


async def test_parts_of_a_response_are_sent_immediately():
    received = asyncio.Event()

    async def handler(_):
        async def parts():
            yield b"first"
            await received.wait()
            yield b"second"

        return StreamingResponse(parts())

    async with (
        HttpService("127.0.0.1", 0, handler) as service,
        httpx2.AsyncClient(trust_env=False, timeout=10) as client,
        client.stream("GET", service.url) as response,
    ):
        parts = response.aiter_bytes()
        assert await anext(parts) == b"first"
        received.set()
        assert await anext(parts) == b"second"


async def test_request_target_is_not_decoded():
    async def handler(request):
        return PlainTextResponse(request_target(request))

    async with HttpService("127.0.0.1", 0, handler) as service, httpx2.AsyncClient(trust_env=False) as client:
        assert (await client.get(service.url + "/a%2Fb%20c?d=%65")).text == "/a%2Fb%20c?d=%65"
