"""Terminal in a task's sandbox, over a WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox.client.connection_settings import authorization_header, unreachable_error
from sandbox.client.errors import UnexpectedResponseError, UnreachableError, error_from_response, refine_not_found
from sandbox.client.parsing import parse_object
from sandbox.client.requests import task_path, translate_url_errors, validate_base_url

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

OPEN_TIMEOUT_SECONDS = 90.0
"""Time limit for opening a terminal.

For a preserved task, the server first creates a sandbox, which takes up to a minute.
"""

CLOSE_TIMEOUT_SECONDS = 2.0

_MESSAGE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True)
class TerminalEnd:
    """How a terminal session ended.

    exit_code: None if the terminal's process continues or its exit status is unknown.
    """

    exit_code: int | None
    message: str


class Terminal:
    """An open terminal. Every method may raise UnreachableError; `messages` also raises UnexpectedResponseError."""

    def __init__(self, server: str, socket: ClientConnection) -> None:
        self._server = server
        self._socket = socket

    async def messages(self) -> AsyncIterator[bytes | bool | TerminalEnd]:
        """Iterate over output (bytes), changes to the write permission (bool), and finally the TerminalEnd."""
        import websockets

        try:
            async for message in self._socket:
                if isinstance(message, bytes):
                    yield message
                    continue
                message_object = parse_object(message)
                if message_object is None:
                    raise UnexpectedResponseError(f"{self._server} sent a malformed message.")
                if message_object.get("type") == "exit":
                    exit_code = message_object.get("exit_code")
                    yield TerminalEnd(
                        exit_code if isinstance(exit_code, int) else None, str(message_object.get("message", ""))
                    )
                    return
                yield bool(message_object.get("types"))
        except websockets.ConnectionClosedError as error:
            raise UnreachableError(f"The connection to {self._server} was lost.") from error
        raise UnreachableError(f"{self._server} closed the connection; the task continues.")

    async def write(self, data: bytes) -> None:
        """Send input."""
        await self._send(data)

    async def resize(self, rows: int, columns: int) -> None:
        """Send the window size."""
        await self._send(json.dumps({"type": "resize", "rows": rows, "columns": columns}))

    async def _send(self, message: bytes | str) -> None:
        import websockets

        try:
            await self._socket.send(message)
        except websockets.ConnectionClosed as error:
            raise UnreachableError(f"The connection to {self._server} was lost.") from error


@asynccontextmanager
async def open_terminal(server: str, token: str | None, task_id: str, **parameters: Any) -> AsyncIterator[Terminal]:
    """Open a terminal.

    parameters: query parameters described in docs/websocket.md. Raises subclasses of ClientError.
    """
    import httpx2
    import websockets
    from websockets.asyncio.client import connect

    class ConnectWithoutRedirects(connect):
        """Ignores redirects, because some versions of websockets send the token to the new address."""

        def process_redirect(self, exc: Exception) -> Exception | str:
            return exc

    server = validate_base_url(server)
    with translate_url_errors():
        url = httpx2.URL(f"ws{server.removeprefix('http')}/api/v1{task_path(task_id, 'terminal')}", params=parameters)
    headers = authorization_header(token)
    try:
        connection = await ConnectWithoutRedirects(
            str(url),
            additional_headers=headers,
            open_timeout=OPEN_TIMEOUT_SECONDS,
            close_timeout=CLOSE_TIMEOUT_SECONDS,
            max_size=_MESSAGE_BYTES_MAX,
            compression=None,
            proxy=None,
        )
    except websockets.InvalidStatus as error:
        refusal = error_from_response(server, error.response.status_code, bytes(error.response.body or b""))
        raise refine_not_found(refusal, server, url.path) from error
    except (OSError, TimeoutError, websockets.InvalidHandshake) as error:
        raise unreachable_error(server, error) from error
    async with connection:
        yield Terminal(server, connection)
