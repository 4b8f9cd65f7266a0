"""Routes for health, probes and metrics."""

from fastapi import Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.errors import retry_after_header
from sandbox.api.json_responses import JsonResponse, problem_response
from sandbox.api.route_declarations import create_router, problem_responses, raw_content
from sandbox.api.server_metrics import CONTENT_TYPE
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.server_services import Health, Occupancy
from sandbox.model.task_state import TaskState
from sandbox.model.wire.server_bodies import AliveBody, HealthBody, OccupancyBody, ReadyBody, RuntimeBody
from sandbox.model.wire.task_conversion import format_timestamp

_SHUTTING_DOWN = "The server is shutting down."


router = create_router("Health")


@router.get(paths.BASIC_HEALTH, responses=problem_responses())
async def get_basic_health(context: ContextDep) -> JsonResponse[AliveBody]:
    """Check whether the server responds."""
    return JsonResponse({"status": "ok", "version": context.settings.version})


@router.get(paths.LIVENESS, responses=problem_responses())
async def get_liveness(context: ContextDep) -> JsonResponse[AliveBody]:
    """Liveness probe: check whether the event loop responds."""
    return await get_basic_health(context)


@router.get(paths.HEALTH, responses=problem_responses())
async def get_health(context: ContextDep) -> JsonResponse[HealthBody]:
    """Get detailed information about the server's health."""
    health = await context.services.administration.health()
    reasons = not_ready_reasons(health, context)
    body: HealthBody = {
        "status": "degraded" if reasons else "ok",
        "ready": not reasons,
        "reasons": reasons,
        "version": health.version,
        "uptime_seconds": round(health.uptime_seconds, 3),
        "tasks": {state.value: health.tasks_by_state.get(state, 0) for state in TaskState},
        "runtimes": [_runtime_body(probe) for probe in health.runtimes],
        "next_probe_at": None if health.next_probe_at is None else format_timestamp(health.next_probe_at),
        "store": {"ok": health.is_store_ok},
        "occupancy": None if health.occupancy is None else _occupancy_body(health.occupancy),
        "disk": {"free_bytes": health.disk_free_bytes, "total_bytes": health.disk_total_bytes},
        "draining_since": None if health.draining_since is None else format_timestamp(health.draining_since),
    }
    return JsonResponse(body)


@router.get(paths.READINESS, responses=problem_responses("service_unavailable"))
async def get_readiness(request: Request, context: ContextDep) -> JsonResponse[ReadyBody] | Response:
    """Readiness probe: check whether the server can accept and run tasks. Returns 503 if it cannot."""
    health = await context.services.administration.health()
    reasons = not_ready_reasons(health, context)
    if not reasons:
        return JsonResponse({"status": "ready"})
    headers = retry_after_header(health.retry_after_seconds)
    return problem_response(
        request, 503, "service_unavailable", " ".join(reasons), extensions={"reasons": reasons}, headers=headers
    )


def not_ready_reasons(health: Health, context: AppContext) -> list[str]:
    """Return the reasons why the server is not ready, including a shutdown, which only the API can detect."""
    reasons = list(health.reasons)
    if not health.is_ready and not reasons:
        reasons = ["The server is not ready."]
    return [*reasons, _SHUTTING_DOWN] if context.shutting_down.is_set() else reasons


def _occupancy_body(occupancy: Occupancy) -> OccupancyBody:
    return {
        "cpus": occupancy.cpus,
        "cpus_reserved": occupancy.cpus_reserved,
        "memory_bytes": occupancy.memory_bytes,
        "memory_reserved_bytes": occupancy.memory_reserved_bytes,
        "disk_bytes": occupancy.disk_bytes,
        "disk_reserved_bytes": occupancy.disk_reserved_bytes,
        "waiting": occupancy.waiting,
    }


def _runtime_body(probe: RuntimeProbe) -> RuntimeBody:
    return {
        "name": probe.runtime,
        "works": probe.is_available,
        "tier": probe.tier,
        "isolates": list(probe.isolation_notes),
        "gaps": list(probe.gaps),
        "limits": sorted(probe.enforced_limits),
        "remedy": probe.remedy,
    }


@router.get(
    paths.METRICS,
    response_class=Response,
    responses={
        200: raw_content("Metrics in the Prometheus text format", text_plain={"type": "string"}),
        **problem_responses("service_unavailable"),
    },
)
async def get_metrics(context: ContextDep) -> Response:
    """Get the metrics in Prometheus format."""
    health = await context.services.administration.health()
    is_ready = not not_ready_reasons(health, context)
    hosts = context.services.hosts
    text = context.metrics.render(health, hosts.list_hosts() if hosts.has_cluster else (), is_ready=is_ready)
    return Response(text, headers={"content-type": CONTENT_TYPE})
