"""Runs both ASGI apps in one event loop and shuts them down within a fixed time."""

import asyncio
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox.api.http.connections import HttpProtocol, PortState, WebSocketProtocol
from sandbox.api.streaming.response import wait_for_disconnect
from sandbox.model.fixed_limits import SHUTDOWN_TIMEOUT_SECONDS

GRACEFUL_SHUTDOWN_SECONDS = round(SHUTDOWN_TIMEOUT_SECONDS / 2)
"""How long responses in progress may continue after the streams have ended; then they are aborted."""

CANCELLATION_TIMEOUT_SECONDS = 0.5
"""How long the server waits for aborted responses to end, so that their end is not logged as an error."""

CLIENT_MESSAGE_BYTES_MAX = 64 * 1024
"""Maximum size of a WebSocket client's message; a larger message closes the connection."""

PING_INTERVAL_SECONDS = 20.0
"""Interval between pings to a WebSocket client."""

PONG_TIMEOUT_SECONDS = 20.0
"""A WebSocket client that does not reply to a ping within this time is disconnected."""


async def serve(
    app: ASGIApp,
    websocket_app: ASGIApp,
    sockets: Sequence[socket.socket],
    websocket_sockets: Sequence[socket.socket],
    *,
    shutting_down: asyncio.Event,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `shutting_down` is set, then end streams, responses and sockets.

    on_started: called once both apps accept requests.
    """
    servers = [_UvicornServer(app), _UvicornServer(websocket_app)]
    try:
        async with asyncio.TaskGroup() as group:
            for server, bound in zip(servers, (sockets, websocket_sockets), strict=True):
                group.create_task(server.serve(sockets=list(bound)))
            group.create_task(_notify_started(servers, on_started))
            await shutting_down.wait()
            for server in servers:
                server.should_exit = True
    finally:
        for server in servers:
            server.abort_connections()
        if requests := [request for server in servers for request in server.server_state.tasks]:
            await asyncio.wait(requests, timeout=CANCELLATION_TIMEOUT_SECONDS)
        for bound_socket in (*sockets, *websocket_sockets):
            bound_socket.close()


class _CancellationMiddleware:
    """Closes the connection of a request that is cancelled at the end of the grace period.

    Without this, uvicorn logs a traceback for each such request, as if the app had failed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            request = asyncio.current_task()
            if request is None or not request.cancelling():
                raise  # a bug: the app awaited something that was cancelled
            scope["state"]["abort"]()
            await wait_for_disconnect(receive)


class _UvicornServer(uvicorn.Server):
    """A uvicorn server that leaves signal handling to its caller."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                _CancellationMiddleware(app),
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_max_size=CLIENT_MESSAGE_BYTES_MAX,
                ws_per_message_deflate=False,
                ws_ping_interval=PING_INTERVAL_SECONDS,
                ws_ping_timeout=PONG_TIMEOUT_SECONDS,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                reset_contextvars=True,
                timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            )
        )
        self.server_state = PortState()
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signal handling to `set_on_signals`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then set `listening`."""
        await super().startup(sockets)
        self.listening.set()

    def abort_connections(self) -> None:
        """Abort connections that are still open after the grace period."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _notify_started(servers: Sequence[_UvicornServer], on_started: Callable[[], None]) -> None:
    for server in servers:
        await server.listening.wait()
    on_started()
