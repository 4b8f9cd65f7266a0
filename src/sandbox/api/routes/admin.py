"""Routes for administration: drain the server, prune tasks."""

from typing import Annotated

from fastapi import Query

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.openapi import create_router, problem_responses
from sandbox.api.responses import JsonResponse
from sandbox.interfaces.tasks import DrainStatus, Retention
from sandbox.model.wire.events import format_timestamp
from sandbox.model.wire.server_bodies import DrainBody, PrunedBody, PrunedTaskBody

router = create_router("Administration")


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
    """Remove finished tasks and their data. Without limits in the request, the server's retention settings apply."""
    bounds = (older_than_seconds, keep, max_bytes)
    retention = None if bounds == (None, None, None) else Retention(*bounds)
    pruned = await context.services.administration.prune(retention, dry_run=dry_run)
    items: list[PrunedTaskBody] = [
        {
            "id": one.id,
            "state": one.state.value,
            "finished_at": format_timestamp(one.finished_at),
            "size_bytes": one.size_bytes,
        }
        for one in pruned
    ]
    total = sum(one.size_bytes for one in pruned)
    return JsonResponse({"dry_run": dry_run, "tasks": items, "total_count": len(items), "total_size_bytes": total})
