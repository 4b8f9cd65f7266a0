"""Counts every answer, refusals included."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.server_metrics import NO_ROUTE, ServerMetrics
from sandbox.contracts.subject import TASK_ID

_STARTS = {"http.response.start", "websocket.http.response.start"}
_SWITCHING = 101
_PROBED = paths.OPEN_PATHS | {paths.METRICS}
_log = logging.getLogger(__name__)


async def note_api_route(connection: HTTPConnection) -> None:
    """The address that this request is for, for whoever counts it."""
    note_route(connection, connection.scope["route"].path_format)
    if (task_id := connection.path_params.get("task_id")) is not None:
        TASK_ID.set(task_id)


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
        began, has_begun = time.monotonic(), False

        def note(status: int) -> None:
            nonlocal has_begun
            has_begun = True
            seconds = time.monotonic() - began
            route = scope.setdefault("state", {}).get("route", NO_ROUTE)
            self._metrics.note_answer(route, scope.get("method", "GET"), status, seconds)
            _log_answer(scope, status, seconds)

        async def send_measured(message: Message) -> None:
            if (status := _status(message)) is not None:
                note(status)
            await send(message)

        try:
            await self._app(scope, receive, send_measured)
        except Exception:
            # The answer to it is made by Starlette's own middleware, around all others.
            if not has_begun:
                note(HTTPStatus.INTERNAL_SERVER_ERROR.value)
            raise


def _log_answer(scope: Scope, status: int, seconds: float) -> None:
    """Probes and open pages ask again and again: they are told of when something is wrong."""
    path, client = scope["path"], scope.get("client")
    is_asked_again = path in _PROBED or path.startswith(paths.ASSETS) or "hx-request" in Headers(scope=scope)
    is_dull = status < 400 and is_asked_again
    _log.log(
        logging.DEBUG if is_dull else logging.INFO,
        "Answered" if scope["type"] == "http" else "Stream answered",
        extra={
            "method": scope.get("method", "GET"),
            "path": path,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "client": client and client[0],
        },
    )


def _status(message: Message) -> int | None:
    if message["type"] == "websocket.accept":
        return _SWITCHING
    return int(message["status"]) if message["type"] in _STARTS else None
