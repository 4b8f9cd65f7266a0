"""Routes of the server itself: health, probes, metrics, hosts, draining, pruning and browser sessions."""

from typing import Annotated

from fastapi import Query, Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep
from sandbox.api.authentication import SESSION_COOKIE, SESSION_SECONDS, get_caller, session_cookie
from sandbox.api.errors import retry_after_header
from sandbox.api.observability import CONTENT_TYPE
from sandbox.api.responses import JsonResponse, problem_response
from sandbox.api.route_declarations import create_router, problem_responses, raw_content
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.server_services import DrainStatus, Health, HostWithTasks, Occupancy, Retention
from sandbox.model.display_text import format_timestamp
from sandbox.model.task_state import TaskState
from sandbox.model.wire.server_and_error_bodies import (
    AliveBody,
    DrainBody,
    HealthBody,
    HostBody,
    HostListBody,
    OccupancyBody,
    PrunedBody,
    PrunedTaskBody,
    ReadyBody,
    RuntimeBody,
    SessionBody,
)

_SHUTTING_DOWN = "The server is shutting down."


health_router = create_router("Health")


@health_router.get(paths.BASIC_HEALTH, responses=problem_responses())
async def get_basic_health(context: ContextDep) -> JsonResponse[AliveBody]:
    """Check whether the server responds."""
    return JsonResponse({"status": "ok", "version": context.settings.version})


@health_router.get(paths.LIVENESS, responses=problem_responses())
async def get_liveness(context: ContextDep) -> JsonResponse[AliveBody]:
    """Liveness probe: check whether the event loop responds."""
    return await get_basic_health(context)


@health_router.get(paths.HEALTH, responses=problem_responses())
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


@health_router.get(paths.READINESS, responses=problem_responses("service_unavailable"))
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


@health_router.get(
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


HOST_TASK_IDS_MAX = 100
"""Maximum number of task ids for each host in a response."""

admin_router = create_router("Administration")


@admin_router.get(paths.HOSTS, responses=problem_responses())
async def list_hosts(context: ContextDep) -> JsonResponse[HostListBody]:
    """List the hosts that run tasks.

    Without a cluster, this is the server's machine. With a cluster, these are the engine's hosts, the hosts on
    which workers have run, and the server's machine while tasks run there.
    """
    return JsonResponse({"hosts": [_host_body(host) for host in context.services.hosts.list_hosts()]})


def _host_body(host: HostWithTasks) -> HostBody:
    status, task_ids = host.status, host.task_ids
    return {
        "name": status.name,
        "state": status.state.value,
        "reason": status.reason,
        "cpus": status.cpus,
        "memory_bytes": status.memory_bytes,
        "running": len(task_ids),
        "task_ids": list(task_ids[:HOST_TASK_IDS_MAX]),
        "last_contact_at": None if status.last_contact_at is None else format_timestamp(status.last_contact_at),
        "version": status.version or None,
        "draining_since": None if status.draining_since is None else format_timestamp(status.draining_since),
    }


@admin_router.post(paths.HOST_DRAIN, responses=problem_responses("host_not_found", "service_unavailable"))
async def begin_host_drain(context: ContextDep, host: paths.HostName) -> JsonResponse[HostBody]:
    """Start no new tasks on a cluster host until the drain is undone, even after a restart.

    Tasks that run on the host continue there, with all their attempts.
    """
    return JsonResponse(_host_body(await context.services.hosts.drain_host(host)))


@admin_router.delete(paths.HOST_DRAIN, responses=problem_responses("host_not_found", "service_unavailable"))
async def undo_host_drain(context: ContextDep, host: paths.HostName) -> JsonResponse[HostBody]:
    """Start tasks on a host of the cluster again."""
    return JsonResponse(_host_body(await context.services.hosts.undo_host_drain(host)))


@admin_router.get(paths.DRAIN, responses=problem_responses())
async def get_drain(context: ContextDep) -> JsonResponse[DrainBody]:
    """Check whether the server is draining, and get the progress of the drain."""
    return _drain_response(await context.services.administration.drain_status())


@admin_router.post(paths.DRAIN, responses=problem_responses("service_unavailable"))
async def begin_drain(context: ContextDep) -> JsonResponse[DrainBody]:
    """Stop accepting new tasks and starting pending ones until the drain is undone, even after a restart.

    Running tasks continue.
    """
    return _drain_response(await context.services.administration.drain())


@admin_router.delete(paths.DRAIN, responses=problem_responses("service_unavailable"))
async def undo_drain(context: ContextDep) -> JsonResponse[DrainBody]:
    """Accept and start tasks again."""
    return _drain_response(await context.services.administration.undo_drain())


def _drain_response(draining: DrainStatus) -> JsonResponse[DrainBody]:
    return JsonResponse(
        {
            "draining": draining.since is not None,
            "since": None if draining.since is None else format_timestamp(draining.since),
            "running": draining.running,
            "waiting": draining.waiting,
        }
    )


_SECONDS_MAX = 100 * 366 * 86_400
_COUNT_MAX = 10_000_000
_BYTES_MAX = 2**60


@admin_router.post(paths.PRUNE, responses=problem_responses("service_unavailable"))
async def prune_tasks(
    context: ContextDep,
    older_than_seconds: Annotated[
        float | None, Query(ge=0, le=_SECONDS_MAX, description="Only tasks that ended more than this many seconds ago")
    ] = None,
    keep: Annotated[
        int | None, Query(ge=1, le=_COUNT_MAX, description="Number of tasks to keep; the oldest are removed")
    ] = None,
    max_bytes: Annotated[
        int | None, Query(ge=0, le=_BYTES_MAX, description="Disk space that all finished tasks may use, in bytes")
    ] = None,
    *,
    dry_run: Annotated[bool, Query(description="Only list what would be removed")] = False,
) -> JsonResponse[PrunedBody]:
    """Remove finished tasks and their data. Without limits in the request, the server's retention settings apply.

    Finished tasks that cannot be examined are kept. If there are any, a dry run lists them, and any other request fails
    with `service_unavailable` after it has removed the other tasks.
    """
    bounds = (older_than_seconds, keep, max_bytes)
    retention = None if bounds == (None, None, None) else Retention(*bounds)
    result = await context.services.administration.prune(retention, dry_run=dry_run)
    items: list[PrunedTaskBody] = [
        {
            "id": one.id,
            "name": one.name,
            "state": one.state.value,
            "finished_at": format_timestamp(one.finished_at),
            "size_bytes": one.size_bytes,
        }
        for one in result.tasks
    ]
    return JsonResponse(
        {
            "dry_run": dry_run,
            "tasks": items,
            "total_count": len(items),
            "total_size_bytes": sum(one.size_bytes for one in result.tasks),
            "unexamined": [{"id": task_id, "reason": reason} for task_id, reason in result.unexamined.items()],
        }
    )


session_router = create_router("Sessions")


@session_router.post(paths.SESSION, responses=problem_responses())
async def open_session(request: Request, context: ContextDep) -> JsonResponse[SessionBody]:
    """Start a session: exchange the request's token for a cookie. Not needed on a server without tokens."""
    caller = get_caller(request)
    assert caller.principal is not None
    principal = caller.principal
    response = JsonResponse[SessionBody]({"role": principal.role.value, "name": principal.name})
    if caller.credentials is not None and caller.credentials.kind == "token":
        response.set_cookie(
            SESSION_COOKIE,
            context.admission.sessions.open(principal.id),
            max_age=SESSION_SECONDS,
            secure=_is_encrypted(request),
            httponly=True,
            samesite="strict",
        )
    return response


@session_router.delete(
    paths.SESSION,
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The session is closed"}, **problem_responses()},
)
async def close_session(request: Request, context: ContextDep) -> Response:
    """End the session of this request's cookie."""
    if cookie := session_cookie(request):
        context.admission.sessions.close(cookie)
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE, secure=_is_encrypted(request), httponly=True, samesite="strict")
    return response


def _is_encrypted(request: Request) -> bool:
    """Return whether the browser's connection is encrypted. If a proxy terminates TLS, `Origin` contains the scheme."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
