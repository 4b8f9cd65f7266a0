"""Upstreams of a flooded gateway: a model that responds immediately, and a host that discards, echoes or floods.

Runs as a program and prints a JSON line with both ports. The first byte of a connection selects the host's behavior; a
connection that starts with a TLS record is echoed.
"""

import asyncio
import json

from doubles.flooded_gateway import MODEL_ADDRESS

RESPONSE_BODY = b'{"type":"message","model":"claude-haiku-4-5","usage":{"input_tokens":10,"output_tokens":5}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(RESPONSE_BODY)
PIECE = bytes(256 * 1024)


async def serve_model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
            writer.write(HEAD + RESPONSE_BODY)
    except (OSError, asyncio.IncompleteReadError):
        writer.transport.abort()


async def serve_host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        kind = await reader.readexactly(1)
        while kind == b"\2":
            writer.write(PIECE)
            await writer.drain()
        while data := await reader.read(256 * 1024):
            if kind in (b"\3", b"\x16"):
                writer.write(data)
                await writer.drain()
        writer.write(b"heard")
        writer.write_eof()
    except (OSError, asyncio.IncompleteReadError):
        writer.transport.abort()


async def main() -> None:
    model = await asyncio.start_server(serve_model, MODEL_ADDRESS, 0, limit=64 * 1024, backlog=512)
    host = await asyncio.start_server(serve_host, "127.0.0.1", 0, limit=512 * 1024, backlog=512)
    ports = {"model": model.sockets[0].getsockname()[1], "host": host.sockets[0].getsockname()[1]}
    print(json.dumps(ports), flush=True)
    await asyncio.gather(model.serve_forever(), host.serve_forever())


if __name__ == "__main__":
    asyncio.run(main())
