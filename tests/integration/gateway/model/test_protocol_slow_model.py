"""Requests that the model has not taken yet are this machine's memory, so all of a sandbox's together are bounded."""

import asyncio
from contextlib import asynccontextmanager, closing, suppress

from doubles.served_gateway import run, served_gateway, until_true
from sandbox.gateway.model import budget

MEBIBYTE = 1024 * 1024
BODY = b'{"model":"m","a":"%s"}' % (b"x" * (8 * MEBIBYTE))
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def slow_model(reads: asyncio.Event):
    """Takes nothing before `reads`, then everything, and answers each request."""

    async def attend(reader, writer):
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            await reads.wait()
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(ANSWER)

    tasks = set()
    server = await asyncio.start_server(
        lambda *ends: tasks.add(asyncio.ensure_future(attend(*ends))), "127.0.0.1", 0, limit=65536
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_no_more_is_taken_in_than_a_bound_until_the_model_has_taken_it(monkeypatch):
    monkeypatch.setattr(budget, "BUFFERED_BYTES_MAX", 20 * MEBIBYTE)

    async def story():
        reads = asyncio.Event()
        async with slow_model(reads) as base_url, served_gateway(base_url) as served:
            clients = [await served.connect() for _ in range(3)]
            for number, client in enumerate(clients[:2], 1):
                client.ask(BODY)
                await until_true(lambda number=number: served.gateway.requests_in_flight == number)
            clients[2].ask(BODY)
            assert (await clients[2].error())[:2] == (429, "rate_limit_error")
            reads.set()
            for client in clients[:2]:
                assert (await client.answer())[0] == 200
            again = await served.connect()
            again.ask(BODY)
            assert (await again.answer())[0] == 200

    run(story)
