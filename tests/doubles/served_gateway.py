"""A gateway that serves on loopback, and a low-level HTTP/1.1 client."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from doubles.loopback_listeners import loopback_listeners
from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import BudgetExhausted, Gateway, GatewayRules, ModelDialect, ModelUpstream
from sandbox.interfaces.runtime import Listeners
from sandbox.model.events import EgressDenied, ErrorReported, Usage

MESSAGES_API = MessagesApi()
GATEWAY_KEY, SERVER_KEY = "task-key-of-this-task", "sk-the-servers-own"


@dataclass
class ServedGateway:
    gateway: Gateway
    listeners: Listeners
    events: list[Usage | EgressDenied | ErrorReported | BudgetExhausted]
    serving: asyncio.Task[None]
    clients: list["Client"] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listeners.model.getsockname()[1])

    def events_of(self, kind: type) -> list:
        return [one for one in self.events if isinstance(one, kind)]

    async def connect(self, port: int | None = None) -> "Client":
        client = Client(*await asyncio.open_connection("127.0.0.1", port or self.port), self.port)
        self.clients.append(client)
        return client

    async def stop(self) -> None:
        self.serving.cancel()
        with suppress(asyncio.CancelledError):
            await self.serving


@asynccontextmanager
async def served_gateway(
    base_url: str, rules: GatewayRules = GatewayRules(), dialect: ModelDialect = MESSAGES_API, **policies
) -> AsyncIterator[ServedGateway]:
    """Serve until the block ends."""
    events: list[Usage | EgressDenied | ErrorReported | BudgetExhausted] = []
    with loopback_listeners() as listeners:
        gateways = SocketGatewayFactory(dialect, **policies)
        gateway = gateways.create(ModelUpstream(base_url, api_key=SERVER_KEY), GATEWAY_KEY, events.append, rules)
        served = ServedGateway(gateway, listeners, events, asyncio.ensure_future(gateway.serve(listeners)))
        try:
            yield served
        finally:
            for client in served.clients:
                client.abort()
            await served.stop()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    port: int
    received: bytes = b""

    def send_request(
        self, body: bytes = b"{}", *, target: str = "/v1/messages?beta=true", key: str = GATEWAY_KEY
    ) -> None:
        head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nX-Api-Key: {key}\r\n"
        self.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def read_response(self) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body of a response. The body has a length or is chunked."""
        head = await self.read_until(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        if "content-length" in headers:
            return int(status.split()[1]), headers, await self.read_exactly(int(headers["content-length"]))
        body = b""
        while size := int(await self.read_until(b"\r\n"), 16):
            body += (await self.read_exactly(size + 2))[:-2]
        await self.read_until(b"\r\n")
        return int(status.split()[1]), headers, body

    async def read_error(self) -> tuple[int, str, str]:
        status, _, body = await self.read_response()
        error = json.loads(body)["error"]
        return status, error["type"], error["message"]

    async def read_until(self, delimiter: bytes) -> bytes:
        part = await self.reader.readuntil(delimiter)
        self.received += part
        return part

    async def read_exactly(self, count: int) -> bytes:
        part = await self.reader.readexactly(count)
        self.received += part
        return part

    async def read_to_end(self) -> bytes:
        """Read until the connection is closed or reset."""
        with suppress(ConnectionError):
            while part := await self.reader.read(65536):
                self.received += part
        return self.received

    def abort(self) -> None:
        self.writer.transport.abort()


async def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Poll until the condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.005)


def run(test: Callable[[], object]) -> None:
    """Run an async test with a timeout."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()  # type: ignore[misc]

    asyncio.run(bounded())
