"""Requests that the model has not read yet use the runner's memory, so their total size per sandbox is limited."""

import asyncio
from contextlib import asynccontextmanager, closing, suppress

from doubles.served_gateway import run, served_gateway, wait_until
from sandbox.gateway.model_api import request_gate

MEBIBYTE = 1024 * 1024
BODY = b'{"model":"m","a":"%s"}' % (b"x" * (8 * MEBIBYTE))
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def slow_model(may_read: asyncio.Event):
    """Serve a model that reads nothing before `may_read` is set, then reads everything and responds to each request."""

    async def serve_client(reader, writer):
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            await may_read.wait()
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(RESPONSE)

    tasks = set()
    server = await asyncio.start_server(
        lambda *ends: tasks.add(asyncio.ensure_future(serve_client(*ends))), "127.0.0.1", 0, limit=65536
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_buffered_requests_are_limited_until_the_model_reads(monkeypatch):
    monkeypatch.setattr(request_gate, "BUFFERED_BYTES_MAX", 20 * MEBIBYTE)

    async def scenario():
        may_read = asyncio.Event()
        async with slow_model(may_read) as base_url, served_gateway(base_url) as served:
            clients = [await served.connect() for _ in range(3)]
            for number, client in enumerate(clients[:2], 1):
                client.send_request(BODY)
                await wait_until(lambda number=number: served.gateway.requests_in_flight == number)
            clients[2].send_request(BODY)
            assert (await clients[2].read_error())[:2] == (429, "rate_limit_error")
            may_read.set()
            for client in clients[:2]:
                assert (await client.read_response())[0] == 200
            later_client = await served.connect()
            later_client.send_request(BODY)
            assert (await later_client.read_response())[0] == 200

    run(scenario)
