"""What Prometheus is told of this server. `docs/metrics.md` lists it."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from sandbox.contracts.tasks import Health
from sandbox.model.state import TaskState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_ROUTE = "none"
"""The route of what was refused before any address was looked for, or is at no address."""

_CREATED = re.compile(rb"(# (HELP|TYPE) )?sandbox_\w+_created\b")
"""When a series began, which OpenMetrics has and this format has not: noise, a line for each series."""

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_ANSWER_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)


class ServerMetrics:
    """The figures of one server, whichever of its doors they come from."""

    def __init__(self, version: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge("sandbox_build_info", "Always 1; the version is the label.", ["version"], registry=registry)
        build.labels(version).set(1)
        self._tasks = Gauge("sandbox_tasks", "Tasks in the state.", ["state"], registry=registry)
        self._requests = Counter(
            "sandbox_http_requests", "Requests that were answered.", ["route", "method", "status"], registry=registry
        )
        self._answer_seconds = Histogram(
            "sandbox_http_answer_seconds",
            "From a request to the beginning of its answer.",
            ["route", "method"],
            buckets=_ANSWER_SECONDS,
            registry=registry,
        )
        self._streams = Gauge("sandbox_streams_open", "Followers that are being told.", ["kind"], registry=registry)
        for kind in ("logs", "websocket"):
            self._streams.labels(kind)
        self._ready = Gauge("sandbox_ready", "1 when the server takes and runs tasks, else 0.", registry=registry)
        self._uptime = Gauge("sandbox_uptime_seconds", "Since the server was started.", registry=registry)
        self._disk_free = Gauge("sandbox_disk_free_bytes", "Free where the data directory is.", registry=registry)
        self._disk_total = Gauge("sandbox_disk_total_bytes", "Size of that file system.", registry=registry)

    def note_answer(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has begun to be answered, `seconds` after it came. route: the template, not the address."""
        shown = method if method in _METHODS else "other"
        self._requests.labels(route, shown, status).inc()
        self._answer_seconds.labels(route, shown).observe(seconds)

    def streaming(self, kind: Literal["logs", "websocket"]) -> AbstractContextManager[object]:
        """Within it one more follower is counted."""
        return self._streams.labels(kind).track_inprogress()

    def text(self, health: Health, *, is_ready: bool) -> bytes:
        """Everything as Prometheus reads it."""
        for state in TaskState:
            self._tasks.labels(state).set(health.tasks_by_state.get(state, 0))
        self._ready.set(is_ready)
        self._uptime.set(health.uptime_seconds)
        self._disk_free.set(health.disk_free_bytes)
        self._disk_total.set(health.disk_total_bytes)
        lines = generate_latest(self._registry).splitlines(keepends=True)
        return b"".join(line for line in lines if not _CREATED.match(line))
