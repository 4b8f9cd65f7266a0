"""Routes for administration: list and drain the hosts, drain the server, prune tasks."""

from typing import Annotated

from fastapi import Query

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.json_responses import JsonResponse
from sandbox.api.route_declarations import create_router, problem_responses
from sandbox.interfaces.server_services import DrainStatus, HostWithTasks, Retention
from sandbox.model.wire.server_bodies import DrainBody, HostBody, HostListBody, PrunedBody, PrunedTaskBody
from sandbox.model.wire.task_conversion import format_timestamp

HOST_TASK_IDS_MAX = 100
"""Maximum number of task ids for each host in a response."""

router = create_router("Administration")


@router.get(paths.HOSTS, responses=problem_responses())
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


@router.post(paths.HOST_DRAIN, responses=problem_responses("host_not_found", "service_unavailable"))
async def begin_host_drain(context: ContextDep, host: paths.HostName) -> JsonResponse[HostBody]:
    """Start no new tasks on a cluster host until the drain is undone, even after a restart.

    Tasks that run on the host continue there, with all their attempts.
    """
    return JsonResponse(_host_body(await context.services.hosts.drain_host(host)))


@router.delete(paths.HOST_DRAIN, responses=problem_responses("host_not_found", "service_unavailable"))
async def undo_host_drain(context: ContextDep, host: paths.HostName) -> JsonResponse[HostBody]:
    """Start tasks on a host of the cluster again."""
    return JsonResponse(_host_body(await context.services.hosts.undo_host_drain(host)))


@router.get(paths.DRAIN, responses=problem_responses())
async def get_drain(context: ContextDep) -> JsonResponse[DrainBody]:
    """Check whether the server is draining, and get the progress of the drain."""
    return _drain_response(await context.services.administration.drain_status())


@router.post(paths.DRAIN, responses=problem_responses("service_unavailable"))
async def begin_drain(context: ContextDep) -> JsonResponse[DrainBody]:
    """Stop accepting new tasks and starting pending ones until the drain is undone, even after a restart.

    Running tasks continue.
    """
    return _drain_response(await context.services.administration.drain())


@router.delete(paths.DRAIN, responses=problem_responses("service_unavailable"))
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


@router.post(paths.PRUNE, responses=problem_responses("service_unavailable"))
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

    Finished tasks that cannot be examined are kept. A dry run lists them; otherwise, the request then fails with
    `service_unavailable` after the other tasks have been removed.
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
