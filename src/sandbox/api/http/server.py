"""Binds the listening sockets, runs both ASGI apps in one event loop, and shuts them down within a fixed time."""

import asyncio
import errno
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox.api.http.connections import HttpProtocol, PortState, WebSocketProtocol
from sandbox.api.streaming_response import wait_for_disconnect
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import SHUTDOWN_TIMEOUT_SECONDS
from sandbox.primitives.fair_client_shares import FairShare

UNREAD_BYTES_MAX = 32 * 1024
"""Bytes of unread requests that the kernel buffers per connection; the kernel doubles the value for overhead."""

UNSENT_BYTES_MAX = 128 * 1024
"""Bytes of a response that the kernel buffers for a client that does not read. The default is several megabytes."""

_LOOPBACK_HOSTS = ("127.0.0.1", "::1")
_EPHEMERAL_PORT_TRIES = 20
_BACKLOG = 2048
"""Maximum number of connections that wait in the kernel to be accepted, per socket."""

_ACCEPTS_PER_ITERATION = 8
"""Connections that are accepted per socket in one iteration of the event loop, so that a flood does not block it."""

_NO_IPV6_ERRNOS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class AddressError(SandboxError):
    """The server cannot listen on this address."""

    code = "address_unavailable"


class UnprotectedAddressError(SandboxError):
    """The address is reachable from other machines, and there are no tokens to authenticate the operator."""

    code = "address_open"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} is reachable from other machines, and no token exists. Create one for this data directory: "
            "sandbox token create --role operator   Or listen on 127.0.0.1, and connect from other machines "
            "through ssh -L."
        )


def is_externally_reachable(sockets: Sequence[socket.socket]) -> bool:
    """Return whether one of the bound sockets is reachable from another machine."""
    addresses = (bound.getsockname()[0].partition("%")[0] for bound in sockets)
    return not all(ip_address(address).is_loopback for address in addresses)


def bind(host: str, port: int, key: str = "port") -> list[socket.socket]:
    """Bind sockets to the same port. 127.0.0.1 and localhost include ::1 if IPv6 is available.

    Port 0 selects any free port. `key` is the port's name in the configuration. Raises AddressError.
    """
    hosts = _LOOPBACK_HOSTS if host in {"127.0.0.1", "localhost"} else (host,)
    for _ in range(_EPHEMERAL_PORT_TRIES if port == 0 else 1):
        try:
            return _bind_all(hosts, port)
        except OSError as error:
            cause = error
    raise _address_error(host, port, key, cause)


def listen(sockets: Sequence[socket.socket], key: str = "port") -> None:
    """Start accepting connections. The kernel refused all earlier connections, so no earlier request had an effect.

    Only listening reserves the port: with SO_REUSEADDR, another server can bind to it until then. Raises AddressError.
    """
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            host, port, *_ = bound.getsockname()
            raise _address_error(host, port, key, error) from None


def _address_error(host: str, port: int, key: str, cause: OSError) -> AddressError:
    return AddressError(
        f"Cannot listen on {host} port {port}: {cause.strerror}. Choose another port with --{key.replace('_', '-')} "
        f"(SANDBOX_{key.upper()}, server.{key} in sandbox.toml), or another address with --host."
    )


def _bind_all(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
    """Bind a socket for each host.

    With port 0, the first socket selects a free port, and the others use the same one.
    """
    bound: list[socket.socket] = []
    try:
        for host in hosts:
            if (opened := _bind_one(host, port, is_optional=bool(bound))) is not None:
                bound.append(opened)
                port = opened.getsockname()[1]
    except OSError:
        for opened in bound:
            opened.close()
        raise
    return bound


def _bind_one(host: str, port: int, *, is_optional: bool) -> socket.socket | None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    try:
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        if is_optional and error.errno in _NO_IPV6_ERRNOS:
            return None
        raise
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES_MAX)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        if is_optional and error.errno in _NO_IPV6_ERRNOS:
            return None
        raise
    return opened


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
    head_share = FairShare()
    servers = [_UvicornServer(app, head_share), _UvicornServer(websocket_app, head_share)]
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

    def __init__(self, app: ASGIApp, head_share: FairShare) -> None:
        super().__init__(
            uvicorn.Config(
                _CancellationMiddleware(app),
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_max_size=CLIENT_MESSAGE_BYTES_MAX,
                ws_per_message_deflate=False,
                ws_ping_interval=PING_INTERVAL_SECONDS,
                ws_ping_timeout=PONG_TIMEOUT_SECONDS,
                backlog=_ACCEPTS_PER_ITERATION,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                reset_contextvars=True,
                timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
            )
        )
        self.server_state = PortState(head_share)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signal handling to `set_on_signals`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then set `listening`."""
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)  # asyncio uses one number both for this and for accepts in one iteration
        self.listening.set()

    def abort_connections(self) -> None:
        """Abort connections that are still open after the grace period."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _notify_started(servers: Sequence[_UvicornServer], on_started: Callable[[], None]) -> None:
    for server in servers:
        await server.listening.wait()
    on_started()
