"""A scripted model API on loopback that records all requests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ssl import SSLContext

Script = Callable[["UpstreamRequest", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class UpstreamRequest:
    """A received request. connection: number of the connection, from 0."""

    head: bytes
    body: bytes
    connection: int
    reader: asyncio.StreamReader

    @property
    def target(self) -> str:
        return self.head.split(b" ")[1].decode()

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}


@dataclass
class ScriptedUpstream:
    """Calls the script to respond to each request; the connection stays open for the next request."""

    script: Script
    port: int = 0
    requests: list[UpstreamRequest] = field(default_factory=list)
    connections: int = 0
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.connections = self.connections, self.connections + 1
        try:
            while request := await _read_request(reader, number):
                self.requests.append(request)
                await self.script(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.disconnected.set()
            writer.close()


@asynccontextmanager
async def scripted_upstream(script: Script, tls: SSLContext | None = None) -> AsyncIterator[ScriptedUpstream]:
    """Serve until the block ends."""
    upstream = ScriptedUpstream(script)
    tasks: set[asyncio.Task[None]] = set()

    def handle_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(upstream.handle_connection(reader, writer)))

    server = await asyncio.start_server(handle_connection, "127.0.0.1", 0, ssl=tls)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader, connection: int) -> UpstreamRequest | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    request = UpstreamRequest(head, b"", connection, reader)
    if "content-length" in request.headers:
        request.body = await reader.readexactly(int(request.headers["content-length"]))
    elif request.headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            request.body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return request
