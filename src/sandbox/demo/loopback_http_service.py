"""HTTP service for the demo's servers: uvicorn on a loopback port, with Starlette's requests and responses."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from types import TracebackType

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

KEEP_ALIVE_TIMEOUT_SECONDS = 24 * 60 * 60
"""Idle timeout of a connection: longer than any demo, so that no connection closes while a client sends a request."""


class HttpService:
    """An asynchronous context manager that passes each request to `handler` and sends the response.

    The handler, or the body of its response, may raise ConnectionError to close the connection. Leaving the context
    aborts all connections and cancels all handlers. uvicorn's `Server` would wait at least 0.2 s for them.
    """

    def __init__(self, host: str, port: int, handler: Callable[[Request], Awaitable[ASGIApp]]) -> None:
        self.url = ""
        self._host = host
        self._port = port
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._state = ServerState()

    async def __aenter__(self) -> HttpService:
        config = Config(
            self._app,
            http=H11Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT_SECONDS,
        )
        config.load()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: H11Protocol(config, self._state, {}), self._host, self._port
            )
        except OSError as error:
            # asyncio's message contains the errno twice and the address as a tuple.
            raise OSError(error.errno, f"{self._host}:{self._port}: {os.strerror(error.errno or 0)}") from None
        self.url = f"http://{self._host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.transport.abort()
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def serve_until_signalled(self) -> None:
        """Print the URL as one JSON line and serve until SIGTERM or SIGINT."""
        gc.freeze()  # modules live until the process ends, so never scan them for garbage, even at exit
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self:
            sys.stdout.write(msgspec.json.encode({"url": self.url}).decode() + "\n")
            sys.stdout.flush()
            await stop.wait()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The client has disconnected or must be disconnected, or the service is ending.
        with contextlib.suppress(ClientDisconnect, ConnectionError, asyncio.CancelledError):
            response = await self._handler(Request(scope, receive))
            await response(scope, receive, send)


def request_target(request: Request) -> str:
    """Return the path and the query as sent by the client, without decoding."""
    path, query = request.scope["raw_path"], request.scope["query_string"]
    target: bytes = path + b"?" + query if query else path
    return target.decode("latin-1")
