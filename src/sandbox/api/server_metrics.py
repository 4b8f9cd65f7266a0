"""The metrics of the server: responses, tasks, load and hosts, in the Prometheus text format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from sandbox.interfaces.server_services import Health, HostWithTasks
from sandbox.model.task_state import TaskState

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
            "sandbox_http_answer_seconds",
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
