"""The access log, and the metrics in the Prometheus text format: responses, tasks, load and hosts.

The middleware counts and logs every response, including rejections.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from http import HTTPStatus
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.interfaces.server_services import Health, HostWithTasks
from sandbox.model.task_state import TaskState
from sandbox.primitives.log_context import TASK_ID

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_ROUTE = "none"
"""The route label of requests that were rejected before routing or matched no route."""

_CREATED_SERIES = re.compile(rb"(# (HELP|TYPE) )?sandbox_\w+_created\b")
"""Matches lines of `_created` series, which belong to OpenMetrics and not to the Prometheus text format."""

HOST_LABELS_MAX = 200
"""Maximum number of hosts in the metrics."""

_KNOWN_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_RESPONSE_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)


class ServerMetrics:
    """The metrics of one server, for both ports."""

    def __init__(self, version: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge("sandbox_build_info", "Always 1; the label contains the version.", ["version"], registry=registry)
        build.labels(version).set(1)
        self._tasks = Gauge("sandbox_tasks", "Number of tasks in the state.", ["state"], registry=registry)
        self._requests = Counter(
            "sandbox_http_requests",
            "Requests by method, path and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._response_seconds = Histogram(
            "sandbox_http_response_seconds",
            "Time from a request to the start of its response.",
            ["route", "method"],
            buckets=_RESPONSE_SECONDS_BUCKETS,
            registry=registry,
        )
        self._streams = Gauge("sandbox_streams_open", "Connected event streams.", ["kind"], registry=registry)
        for kind in ("logs", "websocket", "events"):
            self._streams.labels(kind)
        self._ready = Gauge("sandbox_ready", "1 if the server accepts and runs tasks, otherwise 0.", registry=registry)
        self._uptime = Gauge("sandbox_uptime_seconds", "Time since the server started.", registry=registry)
        self._disk_free = Gauge(
            "sandbox_disk_free_bytes", "Free space on the file system of the data directory.", registry=registry
        )
        self._disk_total = Gauge(
            "sandbox_disk_total_bytes", "Size of the data directory's file system.", registry=registry
        )

        self._host_metrics: _HostMetrics | None = None

    def record_response(self, route: str, method: str, status: int, seconds: float) -> None:
        """Record a response that started `seconds` after its request. route: the path template, not the path."""
        known_method = method if method in _KNOWN_METHODS else "other"
        self._requests.labels(route, known_method, status).inc()
        self._response_seconds.labels(route, known_method).observe(seconds)

    def track_stream(self, kind: Literal["logs", "websocket", "events"]) -> AbstractContextManager[object]:
        """Count an open stream for as long as the context is active."""
        return self._streams.labels(kind).track_inprogress()

    def render(self, health: Health, hosts: Sequence[HostWithTasks] = (), *, is_ready: bool) -> bytes:
        """Render all metrics in the Prometheus text format.

        hosts: the hosts of the cluster. Hosts that are not drained and on which no worker has run are omitted.
        """
        for state in TaskState:
            self._tasks.labels(state).set(health.tasks_by_state.get(state, 0))
        self._ready.set(is_ready)
        self._uptime.set(health.uptime_seconds)
        self._disk_free.set(health.disk_free_bytes)
        self._disk_total.set(health.disk_total_bytes)
        if any(host.status.last_contact_at or host.status.draining_since for host in hosts):
            self._host_metrics = self._host_metrics or _HostMetrics(self._registry)
        if self._host_metrics is not None:
            self._host_metrics.set(hosts)
        lines = generate_latest(self._registry).splitlines(keepends=True)
        return b"".join(line for line in lines if not _CREATED_SERIES.match(line))


class _HostMetrics:
    """The metrics of the hosts of a cluster. A server without a cluster does not export them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._running = Gauge(
            "sandbox_host_tasks_running", "Number of tasks that run on the host.", ["host"], registry=registry
        )
        self._last_contact = Gauge(
            "sandbox_host_last_contact_timestamp_seconds",
            "When a worker on the host last sent a message, in seconds since 1970.",
            ["host"],
            registry=registry,
        )
        self._drained = Gauge(
            "sandbox_host_drained", "1 if the host is drained, otherwise 0.", ["host"], registry=registry
        )

    def set(self, hosts: Sequence[HostWithTasks]) -> None:
        """Set the values of the HOST_LABELS_MAX hosts with the latest message or drain; remove all other hosts."""
        times = {host.status.name: _latest(host.status.last_contact_at, host.status.draining_since) for host in hosts}
        known = [host for host in hosts if times[host.status.name]]
        latest = sorted(known, key=lambda host: times[host.status.name], reverse=True)[:HOST_LABELS_MAX]
        for metric in (self._running, self._last_contact, self._drained):
            metric.clear()
        for host in latest:
            status = host.status
            self._running.labels(status.name).set(len(host.task_ids))
            self._drained.labels(status.name).set(status.draining_since is not None)
            if status.last_contact_at is not None:
                self._last_contact.labels(status.name).set(status.last_contact_at.timestamp())


def _latest(*times: datetime | None) -> float:
    """Return the latest of these times, in seconds since 1970; 0 if there is none."""
    return max((each.timestamp() for each in times if each is not None), default=0.0)


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


_LOGGED_PATH_CHARACTERS_MAX = 512


def _log_response(scope: Scope, status: int, seconds: float) -> None:
    """Log a response. Successful requests from probes and polling pages are logged only at debug level."""
    path, client = scope["path"], scope.get("client")
    is_polled = path in _POLLED_PATHS or path.startswith(paths.ASSETS) or "hx-request" in Headers(scope=scope)
    is_routine = status < 400 and is_polled
    _log.log(
        logging.DEBUG if is_routine else logging.INFO,
        "Request handled" if scope["type"] == "http" else "WebSocket handshake handled",
        extra={
            "method": scope.get("method", "GET"),
            "path": path[:_LOGGED_PATH_CHARACTERS_MAX],
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "client": client and client[0],
        },
    )


def _response_status(message: Message) -> int | None:
    if message["type"] == "websocket.accept":
        return _SWITCHING_PROTOCOLS
    return int(message["status"]) if message["type"] in _START_MESSAGES else None
