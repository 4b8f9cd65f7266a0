"""Counts every answer, refusals included."""

from __future__ import annotations

import time

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api.server_metrics import NO_ROUTE, ServerMetrics

_STARTS = {"http.response.start", "websocket.http.response.start"}
_SWITCHING = 101


async def note_api_route(connection: HTTPConnection) -> None:
    """The address that this request is for, for whoever counts it."""
    note_route(connection, connection.scope["route"].path_format)


def note_route(connection: HTTPConnection, template: str) -> None:
    """The same for an address that is no operation of the API."""
    connection.scope["state"]["route"] = template


class Measured:
    """The outermost of all, so that it sees what was refused too."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look at how the answer begins."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        state = scope.setdefault("state", {})
        method = scope.get("method", "GET")

        async def send_measured(message: Message) -> None:
            if (status := _status(message)) is not None:
                self._metrics.note_answer(state.get("route", NO_ROUTE), method, status, time.monotonic() - began)
            await send(message)

        await self._app(scope, receive, send_measured)


def _status(message: Message) -> int | None:
    if message["type"] == "websocket.accept":
        return _SWITCHING
    return int(message["status"]) if message["type"] in _STARTS else None
