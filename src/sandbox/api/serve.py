"""Both doors served in one event loop, closed within the time that a shutdown may take."""

import asyncio
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from socket import socket

import uvicorn
from starlette.types import ASGIApp

from sandbox.api.connections import HttpConnection, WebSocketConnection
from sandbox.api.strangers import DoorState
from sandbox.model.limits import SHUTDOWN_SECONDS

GRACE_SECONDS = round(SHUTDOWN_SECONDS / 2)
"""Until answers under way are cut, once the streams were told to end."""

CLIENT_MESSAGE_BYTES_MAX = 64 * 1024
"""A message of a WebSocket client, which is ignored; over it: the connection is closed."""

PING_SECONDS = 20.0
"""Between pings to a WebSocket client."""

PONG_SECONDS = 20.0
"""A client that has not answered a ping by then is gone."""


async def serve(
    app: ASGIApp,
    stream_app: ASGIApp,
    sockets: Sequence[socket],
    stream_sockets: Sequence[socket],
    *,
    shutting_down: asyncio.Event,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `shutting_down` is set, then end streams, answers and sockets. `on_started` once both answer."""
    doors = [_Door(app), _Door(stream_app)]
    try:
        async with asyncio.TaskGroup() as group:
            for door, bound in zip(doors, (sockets, stream_sockets), strict=True):
                group.create_task(door.serve(sockets=list(bound)))
            group.create_task(_announce(doors, on_started))
            await shutting_down.wait()
            for door in doors:
                door.should_exit = True
    finally:
        for door in doors:
            door.cut()
        for bound_socket in (*sockets, *stream_sockets):
            bound_socket.close()


@contextmanager
def set_by_signals(event: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event of the running loop."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, event.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


class _Door(uvicorn.Server):
    """A uvicorn server that leaves signals to its caller."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpConnection,
                ws=WebSocketConnection,
                ws_max_size=CLIENT_MESSAGE_BYTES_MAX,
                ws_per_message_deflate=False,
                ws_ping_interval=PING_SECONDS,
                ws_ping_timeout=PONG_SECONDS,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                reset_contextvars=True,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self.server_state = DoorState()
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None of them."""
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """As uvicorn does, and tell."""
        await super().startup(sockets)
        self.listening.set()

    def cut(self) -> None:
        """Close what clients have left open past the grace."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _announce(doors: Sequence[_Door], on_started: Callable[[], None]) -> None:
    for door in doors:
        await door.listening.wait()
    on_started()
