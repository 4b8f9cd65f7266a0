"""Small HTTP/1.1 service on asyncio, for the servers of the demo."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import h11
import msgspec

_READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request; header names are lower case, `path` includes the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class HttpConnection:
    """One HTTP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)

    async def receive(self) -> HttpRequest | None:
        """Return the next request; None once the client sends no more."""
        if self._http.our_state is h11.MUST_CLOSE:
            return None
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        head = await self._next_event()
        if not isinstance(head, h11.Request):
            return None
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        return HttpRequest(head.method.decode(), head.target.decode("latin-1"), headers, bytes(body))

    async def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        return event

    async def send(
        self, status: int, headers: Sequence[tuple[str, str]], parts: Sequence[bytes], delay_seconds: float = 0.0
    ) -> None:
        """Send a response in parts, with a delay before each."""
        await self.start_response(status, headers)
        for part in parts:
            await asyncio.sleep(delay_seconds)
            await self._write(h11.Data(data=part))
        await self._write(h11.EndOfMessage())

    async def start_response(self, status: int, headers: Sequence[tuple[str, str]], part: bytes = b"") -> None:
        """Send the head of a response and the first part of its body."""
        await self._write(h11.Response(status_code=status, headers=list(headers)))
        await self._write(h11.Data(data=part))

    async def _write(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)
            await self._writer.drain()


class HttpService:
    """Passes every request to `handler`, which may raise ConnectionError to abort the connection."""

    def __init__(self, host: str, port: int, handler: Callable[[HttpRequest, HttpConnection], Awaitable[None]]) -> None:
        self.url = ""
        self._host = host
        self._port = port
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> HttpService:
        try:
            self._server = await asyncio.start_server(self._on_connection, self._host, self._port)
        except OSError as error:
            # asyncio's message repeats the reason around the address.
            raise OSError(error.errno, f"{self._host}:{self._port}: {os.strerror(error.errno or 0)}") from None
        self.url = f"http://{self._host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def serve_until_signalled(self) -> None:
        """Print the URL as one JSON line and serve until SIGTERM or SIGINT."""
        gc.freeze()  # modules live until the process ends; never scan them for garbage, even at exit
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self:
            sys.stdout.write(msgspec.json.encode({"url": self.url}).decode() + "\n")
            sys.stdout.flush()
            await stop.wait()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = HttpConnection(reader, writer)
        try:
            while (request := await channel.receive()) is not None:
                await self._handler(request, channel)
        except (OSError, h11.ProtocolError):
            pass  # the client has disconnected, does not use HTTP, or must be disconnected
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
