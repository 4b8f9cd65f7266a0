"""Counts and logs every response, including rejections."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.server_metrics import NO_ROUTE, ServerMetrics
from sandbox.primitives.log_context import TASK_ID

_START_MESSAGES = {"http.response.start", "websocket.http.response.start"}
_SWITCHING_PROTOCOLS = 101
_POLLED_PATHS = paths.PUBLIC_PATHS | {paths.METRICS}
_log = logging.getLogger(__name__)


async def set_api_route(connection: HTTPConnection) -> None:
    """Set the route template of the request for metrics, and the task id for the log."""
    set_route(connection, connection.scope["route"].path_format)
    if (task_id := connection.path_params.get("task_id")) is not None:
        TASK_ID.set(task_id)


def set_route(connection: HTTPConnection, template: str) -> None:
    """Set the route template of a request to an endpoint outside the API."""
    connection.scope["state"]["route"] = template


class AccessLogAndMetricsMiddleware:
    """The outermost middleware, which also processes rejected requests."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app and record the start of its response."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_at, has_response_started = time.monotonic(), False

        def record_start(status: int) -> None:
            nonlocal has_response_started
            has_response_started = True
            seconds = time.monotonic() - request_at
            route = scope.setdefault("state", {}).get("route", NO_ROUTE)
            self._metrics.record_response(route, scope.get("method", "GET"), status, seconds)
            _log_response(scope, status, seconds)

        async def send_measured(message: Message) -> None:
            if (status := _response_status(message)) is not None:
                record_start(status)
            await send(message)

        try:
            await self._app(scope, receive, send_measured)
        except Exception:
            # Starlette's error middleware, which encloses this middleware, creates the error response.
            if not has_response_started:
                record_start(HTTPStatus.INTERNAL_SERVER_ERROR.value)
            raise


def _log_response(scope: Scope, status: int, seconds: float) -> None:
    """Log a response. Successful requests from probes and polling pages are logged only at debug level."""
    path, client = scope["path"], scope.get("client")
    is_polled = path in _POLLED_PATHS or path.startswith(paths.ASSETS) or "hx-request" in Headers(scope=scope)
    is_routine = status < 400 and is_polled
    _log.log(
        logging.DEBUG if is_routine else logging.INFO,
        "Request answered" if scope["type"] == "http" else "WebSocket handshake answered",
        extra={
            "method": scope.get("method", "GET"),
            "path": path,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "client": client and client[0],
        },
    )


def _response_status(message: Message) -> int | None:
    if message["type"] == "websocket.accept":
        return _SWITCHING_PROTOCOLS
    return int(message["status"]) if message["type"] in _START_MESSAGES else None
