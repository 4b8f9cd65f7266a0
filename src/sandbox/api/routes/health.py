"""How the server is, for people, probes and balancers."""

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.context import Asked, Context
from sandbox.api.errors import retry_after
from sandbox.api.middleware.metrics import CONTENT_TYPE
from sandbox.api.openapi import answers, content, problems
from sandbox.api.responses import Json, problem
from sandbox.interfaces.runtime import Probe
from sandbox.interfaces.tasks import Health
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import timestamp

_DRAINS = "The server is shutting down."


def add_health_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.get(paths.BASIC_HEALTH, responses=answers("AliveBody") | problems())(read_basic_health)
    app.get(paths.HEALTH, responses=answers("HealthBody") | problems())(read_health)
    app.get(paths.READINESS, responses=answers("ReadyBody") | problems(503))(read_readiness)
    app.get(paths.LIVENESS, responses=answers("AliveBody") | problems())(read_liveness)


async def read_basic_health(asked: Asked) -> Json:
    """The server answers."""
    return Json({"status": "ok", "version": asked.settings.version})


async def read_liveness(asked: Asked) -> Json:
    """The server is alive: its event loop turns."""
    return await read_basic_health(asked)


async def read_health(asked: Asked) -> Json:
    """How the server is, in detail."""
    health = await asked.tasks.health()
    reasons = reasons_against(health, asked)
    answer: dict[str, Any] = {
        "status": "degraded" if reasons else "ok",
        "ready": not reasons,
        "reasons": reasons,
        "version": health.version,
        "uptime_seconds": round(health.uptime_seconds, 3),
        "tasks": {state: health.tasks_by_state.get(state, 0) for state in TaskState},
        "runtimes": [_runtime(probe) for probe in health.runtimes],
        "next_probe_at": None if health.next_probe_at is None else timestamp(health.next_probe_at),
        "store": {"ok": health.store_ok},
        "occupancy": None if health.occupancy is None else asdict(health.occupancy),
        "disk": {"free_bytes": health.disk_free_bytes, "total_bytes": health.disk_total_bytes},
        "draining_since": None if health.draining_since is None else timestamp(health.draining_since),
    }
    return Json(answer)


async def read_readiness(request: Request, asked: Asked) -> Response:
    """Whether the server can take and run tasks; 503 when it cannot."""
    health = await asked.tasks.health()
    reasons = reasons_against(health, asked)
    if not reasons:
        return Json({"status": "ready"})
    headers = retry_after(health.retry_after_seconds)
    return problem(request, 503, "service_unavailable", " ".join(reasons), fields={"reasons": reasons}, headers=headers)


def reasons_against(health: Health, asked: Context) -> list[str]:
    """Why the server is not ready; that it shuts down is known here, at its doors, first."""
    reasons = list(health.reasons)
    if not health.ready and not reasons:
        reasons = ["The server is not ready."]
    return [*reasons, _DRAINS] if asked.shutting_down.is_set() else reasons


def _runtime(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.runtime,
        "works": probe.works,
        "tier": probe.tier,
        "isolates": probe.isolates,
        "gaps": probe.gaps,
        "limits": sorted(probe.limits),
        "mend": probe.mend,
    }


def add_metrics_route(app: FastAPI) -> None:
    """Put the route of this module on the app."""
    answer = content("The figures in Prometheus' text format", "text/plain")
    app.get(paths.METRICS, response_class=Response, responses={200: answer, **problems(503)})(read_metrics)


async def read_metrics(asked: Asked) -> Response:
    """How the server is, in figures for Prometheus."""
    health = await asked.tasks.health()
    is_ready = not reasons_against(health, asked)
    return Response(asked.metrics.text(health, is_ready=is_ready), headers={"content-type": CONTENT_TYPE})
