"""Routes for administration: drain the server, prune tasks."""

from typing import Annotated

from fastapi import FastAPI, Query

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.openapi import problem_responses, responses_for
from sandbox.api.responses import JsonResponse
from sandbox.interfaces.tasks import DrainStatus, Retention
from sandbox.model.wire.events import format_timestamp


def add_drain_routes(app: FastAPI) -> None:
    """Register the drain routes."""
    app.get(paths.DRAIN, responses=responses_for("DrainBody") | problem_responses())(read_drain)
    app.post(paths.DRAIN, responses=responses_for("DrainBody") | problem_responses(503))(begin_drain)
    app.delete(paths.DRAIN, responses=responses_for("DrainBody") | problem_responses(503))(undo_drain)


async def read_drain(context: ContextDep) -> JsonResponse:
    """Whether the server is draining, and the progress of the drain."""
    return _drain_response(await context.administration.drain_status())


async def begin_drain(context: ContextDep) -> JsonResponse:
    """Reject new tasks and start no pending ones until the drain is undone, even after a restart.

    Running tasks continue.
    """
    return _drain_response(await context.administration.drain())


async def undo_drain(context: ContextDep) -> JsonResponse:
    """Accept and start tasks again."""
    return _drain_response(await context.administration.undo_drain())


def _drain_response(draining: DrainStatus) -> JsonResponse:
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


def add_pruning_routes(app: FastAPI) -> None:
    """Register the prune route."""
    app.post(paths.PRUNE, responses=responses_for("PrunedBody") | problem_responses(503))(prune_tasks)


async def prune_tasks(
    context: ContextDep,
    older_than_seconds: Annotated[
        float | None, Query(ge=0, le=_SECONDS_MAX, description="Remove tasks that ended longer ago than this")
    ] = None,
    keep: Annotated[
        int | None, Query(ge=1, le=_COUNT_MAX, description="Number of tasks to keep; the oldest are removed")
    ] = None,
    max_bytes: Annotated[
        int | None, Query(ge=0, le=_BYTES_MAX, description="Disk space that all finished tasks may use")
    ] = None,
    *,
    dry_run: Annotated[bool, Query(description="Only list what would be removed")] = False,
) -> JsonResponse:
    """Remove finished tasks and their data. Without limits in the request, the server's retention settings apply."""
    bounds = (older_than_seconds, keep, max_bytes)
    retention = None if bounds == (None, None, None) else Retention(*bounds)
    pruned = await context.administration.prune(retention, dry_run=dry_run)
    items = [
        {
            "id": one.id,
            "state": one.state,
            "finished_at": format_timestamp(one.finished_at),
            "size_bytes": one.size_bytes,
        }
        for one in pruned
    ]
    total = sum(one.size_bytes for one in pruned)
    return JsonResponse({"dry_run": dry_run, "tasks": items, "total_count": len(items), "total_size_bytes": total})
